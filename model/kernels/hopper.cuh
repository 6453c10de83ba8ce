// What kernels for Hopper's matrix units share: tiles that come into swizzled memory, and products of them.
//
// Defined before this text is what the instruction that multiplies needs: its SHAPE, and as many names as a thread has
// sums: SUM_NAMES ("%0, %1, .."), SUMS ("+f"(sum[0]), "+f"(sum[1]), ..) and the names of the two operands behind them,
// LEFT and RIGHT (`multiplication` in cuda_source.py).

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(64) TensorMap {
  u64 opaque[16];
};

constexpr int SLICE = 64;  // columns: 128 bytes, which is as wide as memory can be swizzled

__device__ __forceinline__ u32 address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

__device__ __forceinline__ u32 address_of(u32 own, int program) {  // the same place in another program of the cluster
  u32 other;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(other) : "r"(own), "r"(program));
  return other;
}

__device__ __forceinline__ void expect(u32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Until all have arrived, and the bytes that are expected: of tiles, which only matrix units read.
__device__ __forceinline__ void await(u32 barrier, int phase) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "AGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra AGAIN;\n"
      "}" ::"r"(barrier),
      "r"(phase)
      : "memory");
}

// What tells matrix units where an operand lies: swizzled by 128 bytes, groups of eight rows behind one another.
__device__ __forceinline__ u64 operand(u32 at) {
  return (u64)((at & 0x3FFFF) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

__device__ __forceinline__ void multiply(float* sum, u64 weight, u64 x) {
  asm volatile("wgmma.mma_async.sync.aligned." SHAPE ".f32.bf16.bf16 {" SUM_NAMES "}, " LEFT ", " RIGHT
               ", 1, 1, 1, 0, 0;"
               : SUMS
               : "l"(weight), "l"(x));
}

__device__ __forceinline__ u32 pack(float low, float high) {
  u32 both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
__device__ __forceinline__ float low(u32 both) { return __uint_as_float(both << 16); }
__device__ __forceinline__ float high(u32 both) { return __uint_as_float(both & 0xFFFF0000u); }
