"""ModelService: what is served, and by what. An allow-list; the raw configuration never leaves the process."""

from __future__ import annotations

import importlib.metadata
import secrets
from typing import TYPE_CHECKING, Any

import grpc

from service import convert
from service.checkpoint import ModelCard
from service.config import ServeConfig
from service.errors import UnavailableError
from service.requests import Sampling
from service.tokenizing import TextCodec
from service.validation import Rules
from worker.client import EngineClient, EngineUnavailableError

if TYPE_CHECKING:
    from lightqwen.v1 import model_pb2

Context = grpc.aio.ServicerContext[Any, Any]


def version() -> str:
    """The installed version; "unknown" when it runs from a bare checkout."""
    try:
        return importlib.metadata.version("lightqwen")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


class ModelServicer:
    def __init__(
        self, *, config: ServeConfig, card: ModelCard, rules: Rules, codec: TextCodec | None, engine: EngineClient
    ) -> None:
        self._config = config
        self._card = card
        self._rules = rules
        self._codec = codec
        self._engine = engine
        self._instance_id = secrets.token_hex(8)

    async def GetModel(self, message: model_pb2.GetModelRequest, context: Context) -> model_pb2.GetModelResponse:
        """Answers while the engine is not ready, too; the context is then the checkpoint's."""
        self._rules.check_model(message.model)
        info = self._engine.info
        return convert.model_response(
            self._card,
            self._card.context_length if info is None else info.max_model_len,
            self._rules.resolve_sampling(Sampling(seed=0)),
            has_tokenizer=self._codec is not None,
            has_chat=self._codec is not None and self._codec.has_chat_template,
            prefix_cache=self._config.prefix_caching,
        )

    async def GetServerInfo(
        self, message: model_pb2.GetServerInfoRequest, context: Context
    ) -> model_pb2.GetServerInfoResponse:
        info = self._engine.info
        if info is None:
            raise UnavailableError.of(EngineUnavailableError(self._engine.state, ""))
        return convert.server_info_response(self._config, info, version=version(), instance_id=self._instance_id)
