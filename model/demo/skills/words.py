"""The words that questions are made of."""

from __future__ import annotations

import re

from model.demo.skills.question import Random


def _words(text: str) -> list[str]:
    return text.split()


NAMES = _words(
    "Anna Ben Clara David Emma Felix Grace Henry Ivy Jack Kate Leo Mia Noah Olivia Paul Quinn Rosa Sam Tina Uma Victor "
    "Wendy Xavier Yara Zoe Alice Bruno Chloe Daniel Elena Frank Gina Hugo Irene Jonas Karen Lucas Maria Nina Oscar "
    "Petra Ralf Sofia Tom Ursula Vera Walter Aisha Boris Carlos Diana Erik Fiona Gustav Hana Igor Julia Kofi Lena"
)
CITIES = _words(
    "Berlin Paris Rome Madrid London Vienna Prague Warsaw Lisbon Dublin Oslo Stockholm Helsinki Athens Budapest Tokyo "
    "Beijing Shanghai Seoul Delhi Mumbai Cairo Nairobi Lagos Sydney Toronto Boston Chicago Denver Seattle Lima Bogota "
    "Havana Geneva Zurich Munich Hamburg Milan Naples Porto Bergen Krakow Riga Tallinn"
)
COLORS = _words("red blue green yellow black white orange purple brown pink grey silver golden violet")
ANIMALS = _words(
    "cat dog fox bear wolf rabbit horse cow pig goat duck owl eagle mouse lion tiger monkey turtle frog fish whale "
    "parrot hen deer otter beaver camel zebra snake hedgehog"
)
FRUITS = _words("apple pear plum cherry lemon banana mango peach grape melon orange fig kiwi berry coconut papaya")
OBJECTS = _words(
    "box key lamp book chair table door window bottle cup plate spoon knife clock bell coin ring rope ladder basket "
    "candle mirror pillow blanket hammer bucket umbrella suitcase bicycle boat kite drum violin piano guitar flute"
)
PLACES = _words(
    "forest garden village harbour mountain river castle island desert valley market meadow cave lake beach"
)
JOBS = _words(
    "teacher doctor baker farmer pilot painter nurse lawyer driver cook writer singer dancer plumber gardener "
    "carpenter engineer librarian tailor sailor"
)
DRINKS = _words("tea coffee milk water juice cocoa lemonade cider")
INSTRUMENTS = _words("piano guitar violin flute drums cello trumpet harp")
HOBBIES = _words("chess music reading cooking hiking painting swimming cycling dancing sewing fishing climbing")
COUNTRIES = _words(
    "France Spain Italy Poland Norway Sweden Greece Egypt Kenya Japan China India Brazil Peru Canada Mexico"
)
ADJECTIVES = _words("small old quiet bright happy brave clever lonely gentle curious tired proud kind shy young wise")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words("January February March April May June July August September October November December")
COMMON = _words(
    "house tree water light stone paper music winter summer spring autumn morning evening night north south east "
    "west street school letter number picture station bridge engine signal pattern travel answer market silver "
    "yellow orange purple kitchen bedroom machine computer science history language teacher student doctor father "
    "mother brother sister friend people child animal flower grass cloud storm thunder river ocean planet rocket "
    "island bottle button carpet curtain drawer ticket wallet jacket pocket finger shoulder stomach cheese butter "
    "pepper sugar honey bread noodle tomato potato carrot onion garlic spinach strawberry blueberry pumpkin walnut "
    "pencil marker ruler folder journal magazine library museum theatre hospital airport harbor factory village "
    "capital country nation continent mountain glacier desert jungle valley canyon meadow prairie lagoon peninsula "
    "balloon balance bamboo banner barrel blossom cabin cactus camera candle canvas cellar circus copper cotton "
    "cradle crystal diamond dolphin dragon feather fiddle forest fountain galaxy goblin hammer harvest horizon "
    "insect jewel kettle ladder lantern legend lizard magnet marble meteor mirror mitten monster needle nectar "
    "orchard oyster paddle parade parcel pebble pillow pirate puzzle quartz rabbit raccoon ribbon saddle scarf "
    "shelter shadow spider statue temple tunnel turnip umbrella velvet violet voyage wagon whisper window wizard "
    "zipper"
)
PLAIN_WORDS = tuple(dict.fromkeys([*FRUITS, *ANIMALS, *OBJECTS, *COMMON]))

# Names of friends, no two with the same beginning: a character is a token, and the first one has to tell who is meant.
NAMES_ZH = _words("明明 文文 华华 丽丽 强强 芳芳 军军 梅梅 龙龙 雪雪 静静 燕燕 林林 云云 东东 雨雨")
CITIES_ZH = _words("北京 上海 广州 深圳 南京 杭州 成都 武汉 西安 重庆 天津 苏州 青岛 大连 厦门 昆明")
COLORS_ZH = _words("红色 蓝色 绿色 黄色 黑色 白色 紫色 橙色 粉色 灰色")
JOBS_ZH = _words("老师 医生 农民 司机 厨师 律师 护士 画家 作家 歌手 工人 警察")
ANIMALS_ZH = _words("猫 狗 兔子 狐狸 老虎 狮子 猴子 乌龟 鸟 马 熊 羊")
FRUITS_ZH = _words("苹果 香蕉 葡萄 西瓜 桃子 梨 橙子 草莓 芒果 柠檬")
PLACES_ZH = _words("森林 花园 村子 大山 河边 城堡 小岛 沙漠 市场 海边")
DRINKS_ZH = _words("茶 咖啡 牛奶 水 果汁 可乐")

_ONSETS = _words("b c d f g h j k l m n p r s t v w z br cr dr fl gr kl pl st tr")
_VOWELS = _words("a e i o u")
_CODAS = ["", "", "", "n", "r", "l", "s", "t", "m", "k"]


def mend_articles(text: str) -> str:
    """Write "an" before vowels, in a text that has "a" before every noun."""
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def pseudo_word(rng: Random) -> str:
    """A word that does not exist, of two or three syllables."""
    syllables = rng.choice((2, 2, 3))
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables))


def any_word(rng: Random) -> str:
    """A word to be taken apart: one that exists, or one that does not."""
    return rng.choice(PLAIN_WORDS) if rng.random() < 0.6 else pseudo_word(rng)
