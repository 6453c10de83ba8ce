// out = silu(x . gates^T) * (x . ups^T) for many rows: see gated_linear.py.
//
// x [rows, k], weight [2 * n, k], gates before ups, out [rows, n]: bfloat16. scale_squares [rows, parts]: float32.
//
// A tile is ROWS rows of x and GROUPS * 32 features of out. Matrix units have the weight as their left operand, of which
// a group of four warps has 64 rows: in each 16, eight gates and their eight ups, so that a thread has both of a feature.
// x is the right operand of all groups. A program computes one tile after the other; while it finishes one, the next
// one's operands are on their way. CLUSTER programs have neighbouring features of the same rows, and each fetches its
// share of x for all of them.
//
// Defined before this text: ROWS, 32 to 256, a multiple of 32; GROUPS, 2 or 3; CLUSTER, 1 or 2; STAGES, of the ring
// that operands come into; SINGLE, whether no program has more than one tile; SCALED, with SINGLE and if a tile has all
// rows, whether x is still to be multiplied by 1 / rms of its rows; and what hopper.cuh wants.

#include "hopper.cuh"

static_assert(ROWS % 32 == 0 && ROWS <= 256 && (GROUPS == 2 || GROUPS == 3) && (CLUSTER == 1 || CLUSTER == 2));
static_assert(STAGES >= 2 && (SINGLE || !SCALED) && (CLUSTER == 1 || !SINGLE));

constexpr int THREADS = GROUPS * 128;
constexpr int FEATURES = 32;  // of a group
constexpr int PART = 8;       // features of a warp
constexpr int WEIGHT_BYTES = 2 * FEATURES * SLICE * 2;  // of a group
constexpr int X_BYTES = ROWS * SLICE * 2;
constexpr int STAGE_BYTES = GROUPS * WEIGHT_BYTES + X_BYTES;
// A group's results leave in pieces of so many rows. With SINGLE these lie where its rows of the weight were, which it has
// read by then: of a stage, 128 rows have room.
constexpr int PIECE = SINGLE && ROWS > 128 ? ROWS / 2 : ROWS;
constexpr int ROW_BYTES = FEATURES * 2;

// A slice of PART gates and their ups, and of those behind them.
__device__ __forceinline__ void fetch_weight(u32 to, const TensorMap* map, u32 barrier, int column, int part) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %5, %5, %4}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(part), "r"(0)
      : "memory");
}

// A slice of a program's share of x, to the same place in all programs of the cluster; each one's barrier is told.
__device__ __forceinline__ void fetch_x(u32 to, const TensorMap* map, u32 barrier, int column, int row) {
  if (CLUSTER == 1)
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
            "r"(to),
        "l"(map), "r"(barrier), "r"(column), "r"(row)
        : "memory");
  else
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
        "{%3, %4}], [%2], %5;" ::"r"(to),
        "l"(map), "r"(barrier), "r"(column), "r"(row), "h"((u16)((1 << CLUSTER) - 1))
        : "memory");
}

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    gated_linear(const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap x_map,
                 const __grid_constant__ TensorMap out_map,
                 const float* scale_squares,  // read only with SCALED, as parts and eps are
                 float eps, int parts, int rows, int k, int tiles_of_rows, int tiles_of_features, int band) {
  extern __shared__ char memory[];
  __shared__ u64 ready_barriers[STAGES], free_barriers[STAGES];
  __shared__ alignas(8) float scales[ROWS];
  const u32 ring = (address(memory) + 1023) & ~1023u;  // swizzled memory begins at a multiple of that
  const u32 ready = address(ready_barriers), free = address(free_barriers);
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool first_of_group = threadIdx.x % 128 == 0;
  const int own = CLUSTER == 1 ? 0 : blockIdx.x % CLUSTER;
  const int steps = k / SLICE, tiles = tiles_of_rows * tiles_of_features;

  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(ready + 8 * i), "n"(GROUPS));
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(free + 8 * i), "n"(GROUPS * CLUSTER));
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (CLUSTER > 1) {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
  } else {
    __syncthreads();
  }
  asm volatile("griddepcontrol.launch_dependents;");

  // Tiles come in bands of so many tiles of rows, whose x stays in the L2 cache while the weight passes once.
  auto place = [&](int tile, int& row, int& part) {
    const int of_band = band * tiles_of_features, first = tile / of_band * band, in_band = tile % of_band;
    const int at_a_time = min(band, tiles_of_rows - first) * CLUSTER;  // with the features of a cluster
    row = (first + in_band % at_a_time / CLUSTER) * ROWS;
    part = (in_band / at_a_time * CLUSTER + in_band % CLUSTER) * GROUPS * (FEATURES / PART) + group * (FEATURES / PART);
  };

  // What the first thread of a group fetches next: the group's rows of the weight, and if it is the first group's, x.
  int next_tile = blockIdx.x, next_step = 0, next_stage = 0, next_phase = 1, next_row, next_part;
  place(next_tile, next_row, next_part);
  auto fetch = [&](bool weight, bool x) {
    const u32 barrier = ready + 8 * next_stage, at = ring + next_stage * STAGE_BYTES;
    if (weight) {
      expect(barrier, WEIGHT_BYTES + (group == 0 ? X_BYTES : 0));
      fetch_weight(at + group * WEIGHT_BYTES, &weight_map, barrier, next_step * SLICE, next_part);
    }
    if (x && group == 0) {  // the group has read what lay there, others may not have
      await(free + 8 * next_stage, next_phase);
      fetch_x(at + GROUPS * WEIGHT_BYTES + own * (X_BYTES / CLUSTER), &x_map, barrier, next_step * SLICE,
              next_row + own * (ROWS / CLUSTER));
    }
    if (++next_stage == STAGES) next_stage = 0, next_phase ^= 1;
    if (++next_step == steps) {
      next_step = 0, next_tile += gridDim.x;
      if (next_tile < tiles) place(next_tile, next_row, next_part);
    }
  };
  if (first_of_group) {  // the first stages' weights come while the kernel before this one, which writes x, still runs
    const int row = next_row, part = next_part;
    int early = 0;
    for (; early < STAGES && next_tile < tiles; early++) fetch(true, false);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    next_tile = blockIdx.x, next_row = row, next_part = part, next_step = next_stage = 0, next_phase = 1;
    for (int i = 0; i < early; i++) fetch(false, true);
  }
  __syncwarp();
  if (SCALED) {  // the squares come while the first tiles do
    constexpr int OF_WARP = (ROWS + GROUPS * 4 - 1) / (GROUPS * 4), AT_A_TIME = 4;
    asm volatile("griddepcontrol.wait;" ::: "memory");
    float squares[OF_WARP];
#pragma unroll
    for (int i = 0; i < OF_WARP; i++) squares[i] = 0.f;
    for (int first = 0; first < parts; first += 32 * AT_A_TIME)
#pragma unroll
      for (int i = 0; i < OF_WARP; i++)
#pragma unroll
        for (int j = 0; j < AT_A_TIME; j++) {
          const int row = i * GROUPS * 4 + warp, part = first + j * 32 + lane;
          if (row < rows && part < parts) squares[i] += scale_squares[(u64)row * parts + part];
        }
#pragma unroll
    for (int i = 0; i < OF_WARP; i++) {
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2)
        squares[i] += __shfl_xor_sync(~0u, squares[i], distance);
      if (lane == 0 && i * GROUPS * 4 + warp < ROWS)
        scales[i * GROUPS * 4 + warp] = rsqrtf(squares[i] / k + eps);
    }
    __syncthreads();
  }

  const u32 out = SINGLE ? ring + group * WEIGHT_BYTES : ring + STAGES * STAGE_BYTES + group * (ROWS * ROW_BYTES);
  constexpr int TO_NEXT_PIECE = SINGLE ? STAGE_BYTES : PIECE * ROW_BYTES;
  const u32 free_there = CLUSTER == 1 ? free : address_of(free, threadIdx.x % CLUSTER);
  // (With the scope of a program, as it is where none is given: with a cluster's, all that is under way would be waited
  // for, and the L1 cache emptied, at every stage. Nothing but matrix units has read what is given back.)
  auto give_back = [&](int stage) {
    if (threadIdx.x % 128 < CLUSTER)
      asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(free_there + 8 * stage) : "memory");
    if (first_of_group && next_tile < tiles) fetch(true, true);
    __syncwarp();
  };
  int stage = 0, phase = 0;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    float sum[ROWS / 2];
#pragma unroll
    for (int i = 0; i < ROWS / 2; i++) sum[i] = 0.f;
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
      await(ready + 8 * stage, phase);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
      const u64 weight = operand(ring + stage * STAGE_BYTES + group * WEIGHT_BYTES);
      const u64 x = operand(ring + stage * STAGE_BYTES + GROUPS * WEIGHT_BYTES);
#pragma unroll
      for (int i = 0; i < SLICE / 16; i++) multiply(sum, weight + 2 * i, x + 2 * i);  // 16 columns are 32 bytes
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      if (step > 0) {  // the stage before has been read, and this one keeps the matrix units busy
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        give_back(stage == 0 ? STAGES - 1 : stage - 1);
      }
      if (++stage == STAGES) stage = 0, phase ^= 1;
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int i = 0; i < ROWS / 2; i++) asm volatile("" : "+f"(sum[i])::"memory");  // not before they are complete
    give_back(stage == 0 ? STAGES - 1 : stage - 1);

    if (first_of_group) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");  // the tile before has left
    asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
#pragma unroll
    for (int first = 0; first < ROWS; first += 32) {
      u32 results[4];  // each of eight rows, of which a thread has two of one feature
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float* of = sum + first / 2 + i * 4;
        if (SCALED) {
          const float2 scale = *(const float2*)(scales + first + i * 8 + lane % 4 * 2);
          of[0] *= scale.x, of[1] *= scale.y, of[2] *= scale.x, of[3] *= scale.y;
        }
        const u32 gates = pack(silu(of[0]), silu(of[1]));
        results[i] = pack(low(gates) * of[2], high(gates) * of[3]);
      }
      // 16 bytes of a warp lie where the swizzle of rows of 64 bytes has them.
      const int piece = (first + lane) / PIECE, row = (first + lane) % PIECE;
      const u32 to = out + piece * TO_NEXT_PIECE + row * ROW_BYTES + ((warp % 4 ^ (row >> 1 & 3)) << 4);
      asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(results[0]),
                   "r"(results[1]), "r"(results[2]), "r"(results[3])
                   : "memory");
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
    if (first_of_group) {
      int row, part;
      place(tile, row, part);
#pragma unroll
      for (int i = 0; i < ROWS; i += PIECE)  // rows and features that are none are left out
        asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&out_map),
                     "r"(part * PART), "r"(row + i), "r"(out + i / PIECE * TO_NEXT_PIECE)
                     : "memory");
      asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    }
  }
  if (first_of_group) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  if (CLUSTER > 1) {  // until nobody gives back stages of this program, or sends to it
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
  }
}
