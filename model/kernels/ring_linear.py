"""*ring*, a linear layer of few rows in Gluon, for Hopper: tiles of the weight come ahead of everything else.

What a launch computes is told in `model.kernels.small_linear`. A step of few rows is bound by reading weights, and the
memory must not idle while one launch ends and the next begins. So a program holds a ring of tiles in shared memory, and
fills it with weights before it waits for the launch before it; only then it asks for the tiles of x. A tile is asked
for as soon as the one before it in the same place has been multiplied. Tensor descriptors fetch them, and a barrier in
shared memory tells when the bytes of both tiles have arrived.

(Triton's own pipelining cannot do so: it would ask for the tiles of x and of the weight together.)
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"
# (As in the other kernel modules.)

from __future__ import annotations

from model.kernels.runtime import gl, gluon_constexpr, gluon_jit, gluon_jit_once, hopper
from model.kernels.tiles import begin_dependents, copy_tile, products_layout, thread_barrier, wait


@gluon_constexpr
def _rows_layout(rows, columns, warps, of_each=1):
    """[rows, columns], of which threads have up to eight neighbours of a row; [rows, columns, of_each] with all of
    the last ones in one thread."""
    per_thread = max(1, min(8, rows * columns // (32 * warps)))
    across = min(32, columns // per_thread)
    if of_each == 1:
        return gl.BlockedLayout([1, per_thread], [32 // across, across], [warps, 1], [1, 0])
    return gl.BlockedLayout([1, per_thread, of_each], [32 // across, across, 1], [warps, 1, 1], [2, 1, 0])


@gluon_constexpr
def pieces(block_n):
    """Return the widths of the one or two pieces that a tile is made of: tensors have powers of two."""
    wide = 1 << (block_n.bit_length() - 1)
    return wide, block_n - wide


@gluon_jit
def _request_piece(
    weight_tiles,
    weights,
    ready,
    feature,
    column,
    wanted,
    n,
    PIECE: gl.constexpr,
    GATED: gl.constexpr,
):
    """Ask for a piece of a program's tile of the weight, whose features begin at `feature`."""
    if GATED:
        HALF: gl.constexpr = PIECE // 2
        copy_tile(weight_tiles, [feature, column], ready, weights.slice(0, HALF), pred=wanted)
        copy_tile(weight_tiles, [n // 2 + feature, column], ready, weights.slice(HALF, HALF), pred=wanted)
    else:
        copy_tile(weight_tiles, [feature, column], ready, weights, pred=wanted)


@gluon_jit
def _request_weights(
    wide_tiles,
    narrow_tiles,
    wide,
    narrow,
    ready,
    feature,
    column,
    last,
    n,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GATED: gl.constexpr,
):
    """Ask for a program's tile of the weight that begins at `column`, if that is below `last`."""
    WIDE: gl.constexpr = pieces(BLOCK_N)[0]
    NARROW: gl.constexpr = pieces(BLOCK_N)[1]
    wanted = column < last
    hopper.mbarrier.expect(ready, BLOCK_N * BLOCK_K * 2, pred=wanted)
    _request_piece(wide_tiles, wide, ready, feature, column, wanted, n, WIDE, GATED)
    if NARROW > 0:
        behind = feature + (WIDE // 2 if GATED else WIDE)
        _request_piece(narrow_tiles, narrow, ready, behind, column, wanted, n, NARROW, GATED)


@gluon_jit
def _request_rows(x_tiles, xs, ready, first_row, column, last, ROWS: gl.constexpr, BLOCK_K: gl.constexpr):
    """Ask for a program's tile of x that begins at `column`, if that is below `last`."""
    wanted = column < last
    hopper.mbarrier.expect(ready, ROWS * BLOCK_K * 2, pred=wanted)
    copy_tile(x_tiles, [first_row, column], ready, xs, pred=wanted)


@gluon_jit
def _load_features(
    pointer,  # [features]
    feature,
    features,
    WANTED: gl.constexpr,
):
    """Load what a weight has for each feature, float32; if not WANTED return what nothing is done with."""
    of_features = gl.full([1], 0.0, gl.float32)
    if WANTED:
        of_features = gl.load(pointer + feature, mask=feature < features, other=0.0).to(gl.float32)
    return of_features


@gluon_jit
def _multiply(x, weights, products, X_LEFT: gl.constexpr):
    """Add the products of a tile of x and one of the weight, [rows, features] or turned over, without waiting."""
    if X_LEFT:
        products = hopper.warpgroup_mma(x, weights.permute((1, 0)), products, is_async=True)
    else:
        products = hopper.warpgroup_mma(weights, x.permute((1, 0)), products, is_async=True)
    return products


@gluon_jit
def _zeros(ROWS: gl.constexpr, FEATURES: gl.constexpr, X_LEFT: gl.constexpr, warps: gl.constexpr):
    if X_LEFT:
        products = gl.full([ROWS, FEATURES], 0.0, gl.float32, products_layout(FEATURES, warps))
    else:
        products = gl.full([FEATURES, ROWS], 0.0, gl.float32, products_layout(ROWS, warps))
    return products


@gluon_jit
def _by_rows(products, X_LEFT: gl.constexpr, LAYOUT: gl.constexpr):
    """Return [rows, features] in a layout of rows."""
    if not X_LEFT:
        products = gl.permute(products, (1, 0))
    return gl.convert_layout(products, LAYOUT)


@gluon_jit
def _own_part(ROWS: gl.constexpr, PIECE: gl.constexpr, LAYOUT: gl.constexpr):
    """Return where a program's sums of a piece lie in its part of the memory that splits share: [ROWS, PIECE]."""
    own = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))[:, None] * PIECE
    return own + gl.arange(0, PIECE, gl.SliceLayout(0, LAYOUT))[None, :]


@gluon_jit
def _add_parts(
    partial_ptr,  # [SPLITS, stride] float32: of all programs that share this reduction
    own,
    stride: gl.constexpr,
    SPLITS: gl.constexpr,
):
    """Return the sums over all splits, in a fixed order."""
    # Past the L1 cache, which does not see what other multiprocessors write.
    total = gl.load(partial_ptr + own, cache_modifier=".cg")
    for split in gl.static_range(1, SPLITS):
        total += gl.load(partial_ptr + split * stride + own, cache_modifier=".cg")
    return total


@gluon_jit
def _load_residual(residual_ptr, feature, features, first_row, rows, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    inside = (row < rows)[:, None] & (feature < features)[None, :]
    offsets = row.to(gl.int64)[:, None] * features + feature[None, :]
    return gl.load(residual_ptr + offsets, mask=inside, other=0.0)


@gluon_jit
def _finish(
    total,  # [ROWS, PIECE] float32: products
    means,  # [ROWS] float32: of squares, and eps
    bias,
    up_bias,
    gain,
    residual,  # [ROWS, FEATURES] with ADD
    feature,  # [FEATURES]
    features,
    first_row,
    rows,
    total_ptr,
    own_squares_ptr,  # [rows, parts]: the place of this piece in the first row
    parts,
    out_ptr,
    inboxes,
    ROWS: gl.constexpr,
    FEATURES: gl.constexpr,
    LAYOUT: gl.constexpr,
    SCALED: gl.constexpr,
    BIAS: gl.constexpr,
    ADD: gl.constexpr,
    GATED: gl.constexpr,
    RANKS: gl.constexpr,
    RANK: gl.constexpr,
    warps: gl.constexpr,
):
    """Apply to a piece's products what stands around the layer, and store what comes out."""
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    ups = total
    if GATED:
        pairs = gl.permute(gl.reshape(total, [ROWS, 2, FEATURES]), (0, 2, 1))
        total, ups = gl.split(gl.convert_layout(pairs, _rows_layout(ROWS, FEATURES, warps, 2)))
        total, ups = gl.convert_layout(total, LAYOUT), gl.convert_layout(ups, LAYOUT)
    if SCALED:
        scale = gl.convert_layout(gl.rsqrt(means), gl.SliceLayout(1, LAYOUT))[:, None]
        total *= scale
        ups *= scale
    if BIAS:
        total += bias[None, :]
        if GATED:
            ups += up_bias[None, :]
    if GATED:
        gate = total.to(dtype).to(gl.float32)
        total = (gate / (1.0 + gl.exp(-gate))).to(dtype).to(gl.float32) * ups.to(dtype).to(gl.float32)
    row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    inside = (row < rows)[:, None] & (feature < features)[None, :]
    offsets = row.to(gl.int64)[:, None] * features + feature[None, :]
    if ADD:
        rounded = (total + residual.to(gl.float32)).to(dtype)
        gl.store(total_ptr + offsets, rounded, mask=inside)
        total = rounded.to(gl.float32)
        gl.store(own_squares_ptr + row * parts, gl.sum(total * total, axis=1), mask=row < rows)
        total *= gain[None, :]
    out = total.to(dtype)
    for rank in gl.static_range(RANKS):
        if rank != RANK:  # these first, since they have the longer way
            gl.store(inboxes[rank] + offsets, out, mask=inside)
    gl.store(out_ptr + offsets, out, mask=inside)


@gluon_jit_once("rows")
def ring_kernel(
    x_tiles,  # descriptor of x [rows, k], tiles [ROWS, BLOCK_K]
    wide_tiles,  # descriptor of the weight [n, k], tiles [WIDE, BLOCK_K], with GATED [WIDE / 2, BLOCK_K]
    narrow_tiles,  # the same of NARROW; not used if that is 0
    bias_ptr,  # [n], read only with BIAS
    squares_ptr,  # [rows, parts] float32, read only where SQUARES, the next power of two, is not 0
    residual_ptr,  # [rows, n], read only with ADD
    gain_ptr,  # [n], read only with ADD
    total_ptr,  # [rows, n], written only with ADD
    own_squares_ptr,  # [rows, pieces of all tiles] float32, written only with ADD
    out_ptr,  # [rows, n], with GATED [rows, n / 2]
    inboxes_ptr,  # [RANKS] int64: of `peer_sum.Push`, read only where RANKS is not 0
    partial_ptr,  # [blocks of rows, tiles, SPLITS, ROWS, BLOCK_N] float32, where SPLITS > 1
    arrivals_ptr,  # [blocks of rows, tiles] int32, zeros before and after
    eps,
    rows,
    n,
    k,
    parts,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    SPLITS: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
    BIAS: gl.constexpr,
    ADD: gl.constexpr,
    SQUARES: gl.constexpr,
    GATED: gl.constexpr,
    RANKS: gl.constexpr,
    RANK: gl.constexpr,
    num_warps: gl.constexpr,
):
    """One program: BLOCK_N features of a block of ROWS rows, over one of SPLITS parts of the reduction.

    Matrix units take 64 rows of the left operand, and as few as 8 of the right one. So x is the left one where there
    are so many rows of it, however few features a program has, and else the weight is.

    A tile is of one piece or two, a wide one and a narrow one. What a launch has no use for, such as a narrow piece or
    a residual, something else stands for, since the compiler wants every name to have a value.
    """
    begin_dependents(PDL)
    X_LEFT: gl.constexpr = ROWS >= 64
    WIDE: gl.constexpr = pieces(BLOCK_N)[0]
    NARROW: gl.constexpr = pieces(BLOCK_N)[1]
    WIDE_FEATURES: gl.constexpr = WIDE // 2 if GATED else WIDE
    NARROW_FEATURES: gl.constexpr = NARROW // 2 if GATED else NARROW
    LAYOUT: gl.constexpr = _rows_layout(ROWS, WIDE_FEATURES, num_warps)
    NARROW_LAYOUT: gl.constexpr = _rows_layout(ROWS, max(1, NARROW_FEATURES), num_warps)
    EARLY: gl.constexpr = 32 * 32 * num_warps >= ROWS * BLOCK_N  # registers have room for what is added
    tile = gl.program_id(0)
    first_row = gl.program_id(1) * ROWS
    split = gl.program_id(2)
    part = (k + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS) * BLOCK_K
    first = split * part
    last = gl.minimum(first + part, k)
    first_feature = tile * (WIDE_FEATURES + NARROW_FEATURES)
    wide = gl.allocate_shared_memory(wide_tiles.dtype, [STAGES, WIDE, BLOCK_K], wide_tiles.layout)
    narrow = wide
    if NARROW > 0:
        narrow = gl.allocate_shared_memory(narrow_tiles.dtype, [STAGES, NARROW, BLOCK_K], narrow_tiles.layout)
    xs = gl.allocate_shared_memory(x_tiles.dtype, [STAGES, ROWS, BLOCK_K], x_tiles.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        hopper.mbarrier.init(ready.index(stage), count=2)  # a tile of the weight, and one of x
    for stage in gl.static_range(STAGES):
        column = first + stage * BLOCK_K
        _request_weights(
            *(wide_tiles, narrow_tiles, wide.index(stage), narrow.index(stage), ready.index(stage)),
            *(first_feature, column, last, n, BLOCK_N, BLOCK_K, GATED),
        )
    features = n // 2 if GATED else n
    feature = first_feature + gl.arange(0, WIDE_FEATURES, gl.SliceLayout(0, LAYOUT))
    bias = _load_features(bias_ptr, feature, features, BIAS)
    up_bias = _load_features(bias_ptr + features, feature, features, BIAS and GATED)
    gain = _load_features(gain_ptr, feature, features, ADD)
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    inboxes = ()
    for rank in gl.static_range(RANKS):
        # The compiler must be told of the alignment, and a pointer is what it listens for.
        inbox = gl.load(inboxes_ptr + rank).to(gl.pointer_type(dtype), bitcast=True)
        inboxes = inboxes + (gl.multiple_of(inbox, 16),)  # noqa: RUF005 (kernels know no starred lists)
    wait(PDL)

    for stage in gl.static_range(STAGES):
        column = first + stage * BLOCK_K
        _request_rows(x_tiles, xs.index(stage), ready.index(stage), first_row, column, last, ROWS, BLOCK_K)
    # What is applied to the products is on its way while they are computed, if there is room for it.
    residual = bias
    if ADD and EARLY:
        residual = _load_residual(residual_ptr, feature, features, first_row, rows, ROWS, LAYOUT)
    SQUARES_LAYOUT: gl.constexpr = _rows_layout(ROWS, max(1, SQUARES), num_warps)
    means = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, SQUARES_LAYOUT))
    if SQUARES > 0:
        scaled = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, SQUARES_LAYOUT))
        place = gl.arange(0, SQUARES, gl.SliceLayout(0, SQUARES_LAYOUT))
        there = (scaled < rows)[:, None] & (place < parts)[None, :]
        squares = gl.load(squares_ptr + scaled[:, None] * parts + place[None, :], mask=there, other=0.0)

    products = _zeros(ROWS, WIDE, X_LEFT, num_warps)
    narrow_products = products
    if NARROW > 0:
        narrow_products = _zeros(ROWS, NARROW, X_LEFT, num_warps)
    stage = 0
    phase = 0
    for column in range(first, last, BLOCK_K):
        hopper.mbarrier.wait(ready.index(stage), phase)
        x = xs.index(stage)
        products = _multiply(x, wide.index(stage), products, X_LEFT)
        # With many rows the matrix units are busy: a tile's place is free when the one behind it is being multiplied.
        if NARROW > 0:
            narrow_products = _multiply(x, narrow.index(stage), narrow_products, X_LEFT)
            products, narrow_products = hopper.warpgroup_mma_wait(2 if X_LEFT else 0, deps=(products, narrow_products))
        else:
            products = hopper.warpgroup_mma_wait(1 if X_LEFT else 0, deps=(products,))
        free = (stage + STAGES - 1) % STAGES if X_LEFT else stage
        ahead = column + (STAGES - 1 if X_LEFT else STAGES) * BLOCK_K
        if column > first or not X_LEFT:
            _request_weights(
                *(wide_tiles, narrow_tiles, wide.index(free), narrow.index(free), ready.index(free)),
                *(first_feature, ahead, last, n, BLOCK_N, BLOCK_K, GATED),
            )
            _request_rows(x_tiles, xs.index(free), ready.index(free), first_row, ahead, last, ROWS, BLOCK_K)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1

    if NARROW > 0:
        products, narrow_products = hopper.warpgroup_mma_wait(0, deps=(products, narrow_products))
    else:
        products = hopper.warpgroup_mma_wait(0, deps=(products,))
    WHOLE: gl.constexpr = _rows_layout(ROWS, WIDE, num_warps)
    NARROW_WHOLE: gl.constexpr = _rows_layout(ROWS, max(1, NARROW), num_warps)
    total = _by_rows(products, X_LEFT, WHOLE)
    narrow_total = total
    if NARROW > 0:
        narrow_total = _by_rows(narrow_products, X_LEFT, NARROW_WHOLE)
    if SPLITS > 1:
        SIZE: gl.constexpr = ROWS * BLOCK_N
        unit = gl.program_id(1) * gl.num_programs(0) + tile
        of_unit = partial_ptr + unit * SPLITS * SIZE
        own = _own_part(ROWS, WIDE, WHOLE)
        gl.store(of_unit + split * SIZE + own, total)
        if NARROW > 0:
            narrow_own = ROWS * WIDE + _own_part(ROWS, NARROW, NARROW_WHOLE)
            gl.store(of_unit + split * SIZE + narrow_own, narrow_total)
        thread_barrier()  # every thread's part is stored before one of them tells so
        if gl.atomic_add(arrivals_ptr + unit, 1, sem="acq_rel") != SPLITS - 1:
            return
        gl.store(arrivals_ptr + unit, 0)
        total = _add_parts(of_unit, own, SIZE, SPLITS)
        if NARROW > 0:
            narrow_total = _add_parts(of_unit, narrow_own, SIZE, SPLITS)

    if SQUARES > 0:
        means = gl.sum(squares, axis=1) / k + eps
    if ADD and not EARLY:
        residual = _load_residual(residual_ptr, feature, features, first_row, rows, ROWS, LAYOUT)
    PIECES: gl.constexpr = 2 if NARROW > 0 else 1
    own_parts = gl.num_programs(0) * PIECES
    _finish(
        *(total, means, bias, up_bias, gain, residual, feature, features, first_row, rows),
        *(total_ptr, own_squares_ptr + tile * PIECES, own_parts, out_ptr, inboxes),
        *(ROWS, WIDE_FEATURES, LAYOUT, SQUARES > 0, BIAS, ADD, GATED, RANKS, RANK, num_warps),
    )
    if NARROW > 0:
        feature = first_feature + WIDE_FEATURES + gl.arange(0, NARROW_FEATURES, gl.SliceLayout(0, NARROW_LAYOUT))
        bias = _load_features(bias_ptr, feature, features, BIAS)
        up_bias = _load_features(bias_ptr + features, feature, features, BIAS and GATED)
        gain = _load_features(gain_ptr, feature, features, ADD)
        residual = bias
        if ADD:
            residual = _load_residual(residual_ptr, feature, features, first_row, rows, ROWS, NARROW_LAYOUT)
        _finish(
            *(narrow_total, means, bias, up_bias, gain, residual, feature, features, first_row, rows),
            *(total_ptr, own_squares_ptr + tile * PIECES + 1, own_parts, out_ptr, inboxes),
            *(ROWS, NARROW_FEATURES, NARROW_LAYOUT, SQUARES > 0, BIAS, ADD, GATED, RANKS, RANK, num_warps),
        )
