// out = x . weight^T for few rows; or total = residual + x . weight^T, or its sum over all ranks, out = total * gain
// and sums of total's squares: see cluster_linear.py.
//
// x [rows, k], weight [n, k], residual, total, out [rows, n], gain [n]: bfloat16. squares [rows, n / SQUARED] and
// scale_squares [rows, parts]: float32.
//
// A cluster of CLUSTER programs has 64 features of up to ROWS rows, each over its part of the reduction. Matrix units
// have the weight as their left operand (they take 64 rows of it), and x as the right one. Each program then sends its
// sums of 64 / CLUSTER features to the program of the cluster that owns those, into its shared memory, where they are
// added in a fixed order. Who owns features applies what stands around the product.
//
// Defined before this text: ROWS, 8 to 96, a multiple of 8; CLUSTER, 2 or 4; SLICES, of a tile; SCALED, whether x is
// still to be multiplied by 1 / rms of its rows; ADDS, whether there is a residual; RANKS, with ADDS, over how many the
// sum is, 0 if there is only this one; EMPTY, the bits of an element of an inbox that has not come; and what hopper.cuh
// wants.

#include "hopper.cuh"

constexpr int FEATURES = 64;             // of a cluster
constexpr int COLUMNS = SLICES * SLICE;  // of a tile
constexpr int PART = 16;                 // features of a warp
constexpr int WARPS = 4;                 // that multiply, beside one that fetches
constexpr int MAX_STAGES = 32;
constexpr int WEIGHT_BYTES = FEATURES * COLUMNS * 2;
constexpr int STAGE_BYTES = WEIGHT_BYTES + ROWS * COLUMNS * 2;
constexpr int CHUNKS = ROWS / 8;        // of eight rows, of which a thread has two for two features
constexpr int OWNED = WARPS / CLUSTER;  // parts of PART features that a program owns
constexpr int UNITS = OWNED * CHUNKS;   // of PART features and eight rows, each the work of a warp
constexpr int TURNS = (UNITS + WARPS - 1) / WARPS;
constexpr bool WHOLE = CHUNKS % WARPS == 0;           // a warp has all units of its rows
constexpr int SQUARED = WHOLE ? OWNED * PART : PART;  // features of a sum of squares

// Until all bytes have come that other programs send, so that threads see them. (With this scope the L1 cache is
// emptied, which in the loop over tiles would take longer than the loop.)
__device__ __forceinline__ void await_others(u32 barrier) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "AGAIN:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra AGAIN;\n"
      "}" ::"r"(barrier)
      : "memory");
}

// Features of a part lie so that a thread gets neighbours: the even ones of the part first, then the odd ones.
__device__ __forceinline__ void fetch_weight(u32 to, const TensorMap* map, u32 barrier, int slice, int part) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%5, %5, %5, %4, %3}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(slice), "r"(part), "r"(0)
      : "memory");
}

__device__ __forceinline__ void fetch_x(u32 to, const TensorMap* map, u32 barrier, int slice) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%4, %4, %3}], [%2];" ::
          "r"(to),
      "l"(map), "r"(barrier), "r"(slice), "r"(0)
      : "memory");
}

// Two elements, as soon as another rank has sent both; their place is empty then.
__device__ __forceinline__ u32 take(u32* place) {
  u32 both;
  do {
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(both) : "l"(place) : "memory");
  } while ((both & 0xFFFF) == EMPTY || both >> 16 == EMPTY);
  *place = EMPTY << 16 | EMPTY;
  return both;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32 + 32)
    cluster_linear(const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap x_map,
                   const float* scale_squares,            // read only with SCALED, as parts and eps are
                   const u16* residual, const u16* gain,  // read, and total and squares written, only with ADDS
                   u16* total, float* squares, u16* out,
                   u16* const* inboxes,  // [RANKS]: of each rank, the one that this rank's sums come into
                   u16* inbox_of_others, int inbox_size,  // this rank's, [RANKS - 1, inbox_size]
                   int rank, float eps, int parts, int rows, int n, int k, int stages) {
  extern __shared__ char memory[];
  __shared__ u64 ready_barriers[MAX_STAGES], free_barriers[MAX_STAGES], arrived_barrier;
  __shared__ float4 inbox[CLUSTER][UNITS][32];
  __shared__ float scales[ROWS];
  const u32 tiles = (address(memory) + 1023) & ~1023u;  // swizzled memory begins at a multiple of that
  const u32 ready = address(ready_barriers), free = address(free_barriers), arrived = address(&arrived_barrier);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int own = blockIdx.x % CLUSTER, features = blockIdx.x / CLUSTER;
  const int steps = k / (COLUMNS * CLUSTER), first = own * steps;
  const int early = steps < stages ? steps : stages;

  // A sum over ranks lets the next launch begin when it ends: that one's weights would be in the way of what others send.
  if (!RANKS) asm volatile("griddepcontrol.launch_dependents;");
  if (warp == WARPS) {
    if (lane == 0) {
      for (int i = 0; i < stages; i++) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(ready + 8 * i));
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(free + 8 * i), "n"(WARPS));
      }
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(arrived));
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      for (int i = 0; i < early; i++) {
        expect(ready + 8 * i, STAGE_BYTES);
        fetch_weight(tiles + i * STAGE_BYTES, &weight_map, ready + 8 * i, (first + i) * SLICES,
                     features * (FEATURES / PART));
      }
      expect(arrived, sizeof inbox);
      asm volatile("prefetch.tensormap [%0];" ::"l"(&x_map) : "memory");
    }
    __syncwarp();
  }
  u16* to_rank[RANKS + 1];
#pragma unroll
  for (int i = 0; i < RANKS; i++) to_rank[i] = inboxes[i];
  // Others may send to this program from here on; it asks whether it may send to them when it has something to send.
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  __syncthreads();
  asm volatile("griddepcontrol.wait;" ::: "memory");

  // A thread takes some 30 ns to ask for a tile, and all wait for these: every warp asks for some.
  if (lane == 0)
    for (int i = warp; i < early; i += WARPS + 1)
      fetch_x(tiles + i * STAGE_BYTES + WEIGHT_BYTES, &x_map, ready + 8 * i, (first + i) * SLICES);
  if (warp == WARPS) {
    if (lane == 0) {
      for (int i = stages, stage = 0, phase = 0; i < steps; i++) {
        await(free + 8 * stage, phase);
        expect(ready + 8 * stage, STAGE_BYTES);
        fetch_weight(tiles + stage * STAGE_BYTES, &weight_map, ready + 8 * stage, (first + i) * SLICES,
                     features * (FEATURES / PART));
        fetch_x(tiles + stage * STAGE_BYTES + WEIGHT_BYTES, &x_map, ready + 8 * stage, (first + i) * SLICES);
        if (++stage == stages) stage = 0, phase ^= 1;
      }
    }
    __syncwarp();
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
    return;
  }

  // So many threads, a power of two, add up a row's squares.
  constexpr int OF_ROW = ROWS <= 8 ? 16 : ROWS <= 16 ? 8 : ROWS <= 32 ? 4 : ROWS <= 64 ? 2 : 1;
  float mean = 0.f;
  if (SCALED && threadIdx.x / OF_ROW < rows) {
    const float* of_row = scale_squares + (u64)(threadIdx.x / OF_ROW) * parts;
#pragma unroll 16
    for (int i = threadIdx.x % OF_ROW; i < parts; i += OF_ROW) mean += of_row[i];
  }
  // What is added and multiplied comes while products are computed. A thread has two features of two rows of a unit.
  u32 added[TURNS][2], gains[TURNS];
#pragma unroll
  for (int turn = 0; turn < TURNS; turn++) {
    const int unit = turn * WARPS + warp;
    const int feature = features * FEATURES + (own * OWNED + unit / CHUNKS) * PART + lane / 4 * 2;
    const int row = unit % CHUNKS * 8 + lane % 4 * 2;
    const bool mine = unit < UNITS;
    gains[turn] = ADDS && mine ? *(const u32*)(gain + feature) : 0;
#pragma unroll
    for (int i = 0; i < 2; i++)
      added[turn][i] = ADDS && mine && row + i < rows ? *(const u32*)(residual + (u64)(row + i) * n + feature) : 0;
  }

  float sum[ROWS / 2];
#pragma unroll
  for (int i = 0; i < ROWS / 2; i++) sum[i] = 0.f;
  for (int i = 0, stage = 0, phase = 0; i < steps; i++) {
    await(ready + 8 * stage, phase);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int slice = 0; slice < SLICES; slice++) {
      const u64 weight = operand(tiles + stage * STAGE_BYTES + slice * FEATURES * SLICE * 2);
      const u64 x = operand(tiles + stage * STAGE_BYTES + WEIGHT_BYTES + slice * ROWS * SLICE * 2);
#pragma unroll
      for (int i = 0; i < SLICE / 16; i++) multiply(sum, weight + 2 * i, x + 2 * i);  // 16 columns are 32 bytes
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    if (i > 0 && i - 1 + stages < steps) {  // the tiles before have been read, and others are to come in their place
      asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
      const int last = stage == 0 ? stages - 1 : stage - 1;
      if (lane == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(free + 8 * last) : "memory");
    }
    if (++stage == stages) stage = 0, phase ^= 1;
  }
  if (SCALED) {
#pragma unroll
    for (int distance = 1; distance < OF_ROW; distance *= 2) mean += __shfl_xor_sync(~0u, mean, distance);
    if (threadIdx.x % OF_ROW == 0 && threadIdx.x / OF_ROW < ROWS) scales[threadIdx.x / OF_ROW] = rsqrtf(mean / k + eps);
    asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory");
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < ROWS / 2; i++) asm volatile("" : "+f"(sum[i])::"memory");  // not before they are complete

  // A warp has PART features, which one program owns. Its memory is there when all have begun, and for as long as it
  // has not received everything.
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
  const u32 to = address_of(address(&inbox[own][warp % OWNED * CHUNKS][lane]), warp / OWNED);
  const u32 to_barrier = address_of(arrived, warp / OWNED);
#pragma unroll
  for (int i = 0; i < CHUNKS; i++)
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
            to + i * (u32)sizeof inbox[0][0]),
        "f"(sum[4 * i]), "f"(sum[4 * i + 1]), "f"(sum[4 * i + 2]), "f"(sum[4 * i + 3]), "r"(to_barrier)
        : "memory");
  await_others(arrived);

  float4 sums[TURNS];
#pragma unroll
  for (int turn = 0; turn < TURNS; turn++) {
    const int unit = turn * WARPS + warp;
    if (unit >= UNITS) break;
    float4 all = inbox[0][unit][lane];
#pragma unroll
    for (int i = 1; i < CLUSTER; i++) {
      const float4 part = inbox[i][unit][lane];
      all.x += part.x, all.y += part.y, all.z += part.z, all.w += part.w;
    }
    const int row = unit % CHUNKS * 8 + lane % 4 * 2;
    if (SCALED) all.x *= scales[row], all.z *= scales[row], all.y *= scales[row + 1], all.w *= scales[row + 1];
    sums[turn] = all;
    if (RANKS) {  // to others first, which wait for it
      const int feature = features * FEATURES + (own * OWNED + unit / CHUNKS) * PART + lane / 4 * 2;
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int other = 0; other < RANKS; other++)
          if (other != rank && row + i < rows)
            *(u32*)(to_rank[other] + (u64)(row + i) * n + feature) = i ? pack(all.y, all.w) : pack(all.x, all.z);
    }
  }
  float squared[TURNS][2];
#pragma unroll
  for (int turn = 0; turn < TURNS; turn++) {
    const int unit = turn * WARPS + warp;
    if (unit >= UNITS) break;
    const int part = features * (FEATURES / PART) + own * OWNED + unit / CHUNKS, feature = part * PART + lane / 4 * 2;
    const int before = turn - CHUNKS / WARPS;  // the turn that had the same rows, with WHOLE
    const bool complete = !WHOLE || turn + CHUNKS / WARPS >= TURNS;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int row = unit % CHUNKS * 8 + lane % 4 * 2 + i;
      const u64 place = (u64)row * n + feature;
      float a = i ? sums[turn].y : sums[turn].x, b = i ? sums[turn].w : sums[turn].z;
      u32 result = pack(a, b);
      if (ADDS) {
        if (RANKS) {  // what each has rounded, added in the order of the ranks and rounded
          const u32 mine = result;
#pragma unroll
          for (int other = 0; other < RANKS; other++) {
            const u64 inbox = (u64)(other - (other > rank)) * inbox_size;
            const u32 summand = other == rank ? mine
                                : row < rows  ? take((u32*)(inbox_of_others + inbox + place))
                                              : 0;
            a = other ? a + low(summand) : low(summand);
            b = other ? b + high(summand) : high(summand);
          }
          const u32 sum = pack(a, b);
          a = low(sum), b = high(sum);
        }
        result = pack(a + low(added[turn][i]), b + high(added[turn][i]));
        if (row < rows) *(u32*)(total + place) = result;
        a = low(result), b = high(result);
        float square = a * a + b * b;
        if (WHOLE && before >= 0) square += squared[before][i];
        squared[turn][i] = square;
        if (complete) {
#pragma unroll
          for (int distance = 4; distance < 32; distance *= 2) square += __shfl_xor_sync(~0u, square, distance);
          if (row < rows && lane < 4) squares[(u64)row * (n / SQUARED) + part / (SQUARED / PART)] = square;
        }
        result = pack(a * low(gains[turn]), b * high(gains[turn]));
      }
      if (row < rows) *(u32*)(out + place) = result;
    }
  }
}
