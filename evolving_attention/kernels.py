"""Experimental Triton kernels for everything between the two matrix products of attention.

:func:`attend` is the one entry: it evolves a layer's map and gives its probabilities,

    A_in = alpha * A^{k-1} + (1 - alpha) * logits^k, zero where `mask`     _mix_kernel
    A^k  = beta * ReLU(Conv(A_in)) + (1 - beta) * A_in                     _evolve_kernel
    P    = dropout(softmax(A^k, minus infinity where `hidden`))            _softmax_kernel

with gradients. The kernels run only where :func:`supported` says so and the environment variable
EVOLVING_ATTENTION_TRITON is 1; everywhere else :func:`attend` is :func:`attend_eager`, the same in
PyTorch.

EXPERIMENTAL, off by default: these kernels have been run in Triton's interpreter on the CPU and
compiled for compute capability 9.0, never run on a real GPU. Their speed is unknown, the sizes of
their blocks are guesses. Where asked for, ViT and DeiT use them, as long as they have no mask.

Every kernel computes in float32. What passes from one to the next, the maps and their gradients,
is stored in the dtype of the logits, for traffic to memory is what bounds them. The backward pass
keeps A_in and P, two maps, of which P is kept by the product with the values anyway, and one
float32 per row. A_in is stored since recomputing it would keep two maps in its stead (the logits
and A^{k-1}) and mix anew under every one of the window's cells; A^k is recomputed, since its
convolution must be, for the sign of the ReLU. Dropout is recomputed from its seed.
"""

import os
from typing import Any, Dict, Optional, Tuple, Union

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from evolving_attention import functional

try:
    import triton
    import triton.language as tl

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        triton = None  # its kernels take no tuples
except ImportError:
    triton = None

MAX_HEADS = 16
KERNEL_SIZES = (1, 3, 5)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Whether triton was imported with TRITON_INTERPRET=1: its own functions are interpreted, too.
INTERPRETED = triton is not None and not isinstance(tl.zeros, triton.JITFunction)


def attend(
    attn_logits: Tensor,
    prev_attn_logits: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    alpha: Union[float, Tensor],
    beta: Union[float, Tensor],
    window: str = "bidirectional",
    mask: Optional[Tensor] = None,
    hidden: Optional[Tensor] = None,
    dropout: float = 0.0,
    seed: Optional[int] = None,
) -> Tuple[Tensor, Tensor]:
    """A layer's evolved map and its attention probabilities, from the map of the layer before.

    Args:
        attn_logits: this layer's logits before the softmax, scaled, (B, H, T, S); finite.
        prev_attn_logits: the map the layer before handed on, same shape and dtype.
        weight: (H, H, K, K), K odd; None is no convolution.
        bias: (H,).
        alpha: weight of the previous map, in [0, 1]; a tensor of one element if learned.
        beta: weight of the convolution, in [0, 1]; likewise.
        window: "bidirectional", "causal" or "cross", see :func:`evolving_attention.evolve`.
        mask: bool, broadcastable to (B, H, T, S); True where a cell does not exist and the
            convolution is to read 0.
        hidden: bool, likewise; True where the softmax must not look.
        dropout: share of the probabilities to drop, in [0, 1).
        seed: of the dropout, its lowest 31 bits; None draws one from PyTorch's generator. The
            kernels and :func:`attend_eager` drop different cells for the same seed, and a
            captured CUDA graph drops the same ones each time.

    Returns:
        The map to hand on and the probabilities after dropout, both (B, H, T, S) in the dtype of
        `attn_logits`. A row that is hidden throughout has probabilities 0. Gradients flow through
        both; the kernels have no second derivatives.

    Raises:
        ValueError: shapes, dtypes or options do not fit; the message names the argument.
    """
    arguments = (attn_logits, prev_attn_logits, weight, bias, alpha, beta, window, mask, hidden)
    if not (enabled() and supported(attn_logits, weight, bias, alpha, beta)):
        return attend_eager(*arguments, dropout, seed)
    _check(*arguments, dropout)
    if seed is None:
        seed = _draw_seed() if dropout > 0 else 0
    return _Attend.apply(*arguments, dropout, seed & 0x7FFFFFFF)


def attend_eager(
    attn_logits: Tensor,
    prev_attn_logits: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    alpha: Union[float, Tensor],
    beta: Union[float, Tensor],
    window: str = "bidirectional",
    mask: Optional[Tensor] = None,
    hidden: Optional[Tensor] = None,
    dropout: float = 0.0,
    seed: Optional[int] = None,
) -> Tuple[Tensor, Tensor]:
    """:func:`attend` in PyTorch alone, for every device and dtype."""
    arguments = (attn_logits, prev_attn_logits, weight, bias, alpha, beta, window, mask, hidden)
    _check(*arguments, dropout)
    evolved = functional.evolve(*arguments[:-1])
    visible = evolved
    if hidden is not None:
        # Not where the whole row is hidden: its softmax would be NaN.
        visible = evolved.masked_fill(hidden & ~hidden.all(-1, keepdim=True), float("-inf"))
    probs = visible.softmax(dim=-1)
    if hidden is not None:
        probs = probs.masked_fill(hidden, 0.0)
    if dropout > 0:
        generator = torch.Generator(probs.device)
        generator.manual_seed(_draw_seed() if seed is None else seed & 0x7FFFFFFF)
        kept = torch.rand(probs.shape, generator=generator, device=probs.device) >= dropout
        probs = probs * kept / (1 - dropout)
    return evolved, probs.to(attn_logits.dtype)  # autocast may have made it float32


def enabled() -> bool:
    """Whether the environment asks for the kernels: EVOLVING_ATTENTION_TRITON=1."""
    return os.environ.get("EVOLVING_ATTENTION_TRITON") == "1"


def supported(
    attn_logits: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    alpha: Union[float, Tensor],
    beta: Union[float, Tensor],
) -> bool:
    """Whether the kernels can do what these arguments of :func:`attend` ask for.

    They want Triton 3.3 (PyTorch 2.7) or newer, an NVIDIA GPU of compute capability 8.0 or more
    (or Triton's interpreter), float16, bfloat16 or float32, at most 16 heads, a convolution of
    kernel size 1, 3 or 5, and alpha and beta that are numbers, not learned.
    """
    if triton is None or weight is None or bias is None:
        return False
    if isinstance(alpha, Tensor) or isinstance(beta, Tensor):
        return False
    tensors = (attn_logits, weight, bias)
    return (
        len({tensor.device for tensor in tensors}) == 1
        and (INTERPRETED or _tensor_cores(attn_logits.device))
        and all(tensor.dtype in DTYPES for tensor in tensors)
        and attn_logits.dim() == weight.dim() == 4
        and attn_logits.numel() > 0
        and attn_logits.size(1) <= MAX_HEADS
        and weight.size(-1) in KERNEL_SIZES
    )


def _tensor_cores(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _draw_seed() -> int:
    # On the CPU, so that no GPU is waited for; torch.manual_seed and checkpointing govern it.
    return int(torch.randint(2**31, ()))


def _check(
    attn_logits: Tensor,
    prev_attn_logits: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    alpha: Union[float, Tensor],
    beta: Union[float, Tensor],
    window: str,
    mask: Optional[Tensor],
    hidden: Optional[Tensor],
    dropout: float,
) -> None:
    """Raises ValueError, naming the argument, unless the arguments of `attend` fit each other."""
    functional.check_maps(attn_logits, prev_attn_logits, mask, attn_logits.size(1))
    functional.check_window(window)
    functional.check_weights(weight, bias, alpha, beta, attn_logits.size(1))
    if hidden is not None:
        functional.check_mask("hidden", hidden, attn_logits)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")


# A kernel by tiles computes BLOCK_T x BLOCK_S cells of a map, flattened to CELLS of them, for all
# heads at once, (LANES, CELLS); a kernel by rows, whole rows (ROWS, COLUMNS) after (ROWS, COLUMNS).
# `size` is (heads, queries, keys), `reach` how many rows above and columns to the left of a cell
# its window starts, `strides` those of a mask, which may be broadcast.
LANES = MAX_HEADS  # the fewest that tl.dot takes; heads beyond those that exist are zero
BLOCK_T, BLOCK_S = 8, 32
CELLS = BLOCK_T * BLOCK_S
TILE_WARPS = 8  # with 4, a tile takes too many registers (compiled for compute capability 9.0)
ROW_CELLS = 1024  # ROWS x COLUMNS
WEIGHT_PROGRAMS = 1024  # of the weight's gradient: several for each of a GPU's processors

if triton is not None:
    # A jitted function reads nothing from outside but tl.constexpr.
    _LANES, _CELLS = tl.constexpr(LANES), tl.constexpr(CELLS)
    _BLOCK_T, _BLOCK_S = tl.constexpr(BLOCK_T), tl.constexpr(BLOCK_S)

    @triton.jit
    def _tile(tile, size):
        """Where a tile is: its batch element, and its cells' rows and columns, (CELLS,) each."""
        _, queries, keys = size
        across, down = tl.cdiv(keys, _BLOCK_S), tl.cdiv(queries, _BLOCK_T)
        cell = tl.arange(0, _CELLS)
        t = tile // across % down * _BLOCK_T + cell // _BLOCK_S
        s = tile % across * _BLOCK_S + cell % _BLOCK_S
        return (tile // (across * down)).to(tl.int64), t, s  # offsets in large maps need 64 bits

    @triton.jit
    def _tile_cells(batch, t, s, size):
        """All heads' cells at (t, s), (LANES, CELLS): rows, offsets, and whether they exist."""
        heads, queries, keys = size
        head = tl.arange(0, _LANES)[:, None]
        first_row = (batch * heads + head) * queries
        cell = first_row * keys + (t.to(tl.int64) * keys + s)[None, :]
        exists = (t >= 0) & (t < queries) & (s >= 0) & (s < keys)
        return first_row + t[None, :], cell, exists[None, :] & (head < heads)

    @triton.jit
    def _load_tile(maps, batch, t, s, size):
        """All heads' cells at (t, s), 0 beyond the border: float32 (LANES, CELLS)."""
        _, cell, exists = _tile_cells(batch, t, s, size)
        return tl.load(maps + cell, mask=exists, other=0.0).to(tl.float32)

    @triton.jit
    def _row_cells(start, rows, keys, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """Rows (ROWS, 1) of this program, columns (1, COLUMNS) from `start`, offsets, existence."""
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        s = start + tl.arange(0, COLUMNS)[None, :]
        return row, s, row * keys + s, (row < rows) & (s < keys)

    @triton.jit
    def _fill(x, mask, value, batch, head, t, s, strides, exists):
        """`value` where the mask, if there is one, is True, `x` elsewhere."""
        if mask is not None:
            stride_b, stride_h, stride_t, stride_s = strides
            row = batch * stride_b + head * stride_h + t.to(tl.int64) * stride_t
            cell = row + s.to(tl.int64) * stride_s
            x = tl.where(tl.load(mask + cell, mask=exists, other=False), value, x)
        return x

    @triton.jit
    def _fill_tile(x, mask, value, batch, t, s, size, strides):
        """:func:`_fill` for a tile."""
        head = tl.arange(0, _LANES)[:, None].to(tl.int64)
        _, _, exists = _tile_cells(batch, t, s, size)
        return _fill(x, mask, value, batch, head, t[None, :], s[None, :], strides, exists)

    @triton.jit
    def _fill_rows(x, mask, value, row, s, size, strides, exists):
        """:func:`_fill` for rows."""
        heads, queries, _ = size
        batch, head, t = row // queries // heads, row // queries % heads, row % queries
        return _fill(x, mask, value, batch, head, t, s, strides, exists)

    @triton.jit
    def _convolve(maps, weight, batch, t, s, size, reach, K: tl.constexpr, PRECISION: tl.constexpr):
        """Heads as channels: weight[:, :, r, c] @ maps[:, t + r, s + c], summed over the window."""
        heads, above, left = size[0], reach[0], reach[1]
        head_out, head_in = tl.arange(0, _LANES)[:, None], tl.arange(0, _LANES)[None, :]
        exists = (head_out < heads) & (head_in < heads)
        conv = tl.zeros((_LANES, _CELLS), tl.float32)
        for r in range(K):
            for c in range(K):
                w = weight + ((head_out * heads + head_in) * K + r) * K + c
                w = tl.load(w, mask=exists, other=0.0).to(tl.float32)
                shifted = _load_tile(maps, batch, t + r - above, s + c - left, size)
                conv = tl.dot(w, shifted, conv, input_precision=PRECISION)
        return conv

    @triton.jit
    def _refine(
        a_in,
        weight,
        bias,
        beta,
        batch,
        t,
        s,
        size,
        reach,
        K: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """Equation 2: A = beta * ReLU(Conv(A_in)) + (1 - beta) * A_in; gives A and Conv(A_in)."""
        head = tl.arange(0, _LANES)[:, None]
        conv = _convolve(a_in, weight, batch, t, s, size, reach, K, PRECISION)
        conv += tl.load(bias + head, mask=head < size[0], other=0.0).to(tl.float32)
        a = beta * tl.maximum(conv, 0.0) + (1 - beta) * _load_tile(a_in, batch, t, s, size)
        return a, conv

    @triton.jit
    def _drop(x, seed, cell, dropout):
        """Dropout of the cells that `seed` says, the same of a map and of its gradient."""
        return tl.where(tl.rand(seed, cell) < dropout, 0.0, x / (1 - dropout))

    @triton.jit
    def _mix_kernel(
        attn_logits,
        prev_attn_logits,
        mask,
        a_in,
        alpha,
        rows,
        size,
        strides,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        """Equation 1: A_in = alpha * A^{k-1} + (1 - alpha) * logits, zero where `mask` is True."""
        for start in range(0, size[2], COLUMNS):
            row, s, cell, exists = _row_cells(start, rows, size[2], ROWS, COLUMNS)
            logits = tl.load(attn_logits + cell, mask=exists, other=0.0).to(tl.float32)
            prev = tl.load(prev_attn_logits + cell, mask=exists, other=0.0).to(tl.float32)
            mixed = alpha * prev + (1 - alpha) * logits
            mixed = _fill_rows(mixed, mask, 0.0, row, s, size, strides, exists)
            tl.store(a_in + cell, mixed, mask=exists)

    @triton.jit
    def _evolve_kernel(
        a_in,
        weight,
        bias,
        evolved,
        beta,
        size,
        reach,
        K: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """Equation 2, :func:`_refine`, of one tile."""
        batch, t, s = _tile(tl.program_id(0), size)
        a, _ = _refine(a_in, weight, bias, beta, batch, t, s, size, reach, K, PRECISION)
        _, cell, exists = _tile_cells(batch, t, s, size)
        tl.store(evolved + cell, a, mask=exists)

    @triton.jit(do_not_specialize=["seed"])
    def _softmax_kernel(
        evolved,
        hidden,
        probs,
        log_sums,
        dropout,
        seed,
        rows,
        size,
        strides,
        DROPOUT: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        """dropout(softmax(A)), and log(sum(exp(A))) of each row for the backward pass."""
        # From the least finite number on: in a row all hidden, -inf - -inf would be NaN.
        top = tl.full((ROWS, 1), -3.4028234663852886e38, tl.float32)
        total = tl.zeros((ROWS, 1), tl.float32)
        for start in range(0, size[2], COLUMNS):
            row, s, cell, exists = _row_cells(start, rows, size[2], ROWS, COLUMNS)
            a = tl.load(evolved + cell, mask=exists, other=float("-inf")).to(tl.float32)
            a = _fill_rows(a, hidden, float("-inf"), row, s, size, strides, exists)
            new_top = tl.maximum(top, tl.max(a, axis=1, keep_dims=True))
            total = total * tl.exp(top - new_top)
            total += tl.sum(tl.exp(a - new_top), axis=1, keep_dims=True)
            top = new_top
        log_sum = top + tl.log(tl.where(total > 0, total, 1.0))
        for start in range(0, size[2], COLUMNS):
            row, s, cell, exists = _row_cells(start, rows, size[2], ROWS, COLUMNS)
            a = tl.load(evolved + cell, mask=exists, other=float("-inf")).to(tl.float32)
            a = _fill_rows(a, hidden, float("-inf"), row, s, size, strides, exists)
            p = tl.exp(a - log_sum)
            if DROPOUT:
                p = _drop(p, seed, cell, dropout)
            tl.store(probs + cell, p, mask=exists)
        row, _, _, _ = _row_cells(0, rows, size[2], ROWS, COLUMNS)
        tl.store(log_sums + row, log_sum, mask=row < rows)

    @triton.jit
    def _row_dot_kernel(x, y, dots, rows, keys, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """The inner products of the rows of two maps."""
        dot = tl.zeros((ROWS, 1), tl.float32)
        for start in range(0, keys, COLUMNS):
            _, _, cell, exists = _row_cells(start, rows, keys, ROWS, COLUMNS)
            product = tl.load(x + cell, mask=exists, other=0.0).to(tl.float32)
            product *= tl.load(y + cell, mask=exists, other=0.0).to(tl.float32)
            dot += tl.sum(product, axis=1, keep_dims=True)
        row, _, _, _ = _row_cells(0, rows, keys, ROWS, COLUMNS)
        tl.store(dots + row, dot, mask=row < rows)

    @triton.jit(do_not_specialize=["seed"])
    def _refine_backward_kernel(
        a_in,
        weight,
        bias,
        hidden,
        log_sums,
        dots,
        grad_probs,
        grad_evolved,
        grad_a,
        grad_conv,
        beta,
        dropout,
        seed,
        size,
        reach,
        strides,
        DROPOUT: tl.constexpr,
        K: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """Back through the softmax and the ReLU: gradients of A (from both outputs) and Conv."""
        batch, t, s = _tile(tl.program_id(0), size)
        row, cell, exists = _tile_cells(batch, t, s, size)
        a, conv = _refine(a_in, weight, bias, beta, batch, t, s, size, reach, K, PRECISION)
        grad = tl.zeros((_LANES, _CELLS), tl.float32)
        if grad_evolved is not None:
            grad += tl.load(grad_evolved + cell, mask=exists, other=0.0).to(tl.float32)
        if grad_probs is not None:
            a = a.to(a_in.dtype.element_ty).to(tl.float32)  # as the softmax read it
            a = _fill_tile(a, hidden, float("-inf"), batch, t, s, size, strides)
            p = tl.exp(a - tl.load(log_sums + row, mask=exists, other=0.0))
            grad_p = tl.load(grad_probs + cell, mask=exists, other=0.0).to(tl.float32)
            if DROPOUT:
                grad_p = _drop(grad_p, seed, cell, dropout)
            grad += p * (grad_p - tl.load(dots + row, mask=exists, other=0.0))
        tl.store(grad_a + cell, grad, mask=exists)
        tl.store(grad_conv + cell, tl.where(conv > 0, beta * grad, 0.0), mask=exists)

    @triton.jit
    def _mix_backward_kernel(
        grad_a,
        grad_conv,
        weight,
        mask,
        grad_logits,
        grad_prev,
        alpha,
        beta,
        size,
        reach,
        strides,
        K: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """Back through the convolution, by the transposed one, and the mix."""
        batch, t, s = _tile(tl.program_id(0), size)
        _, cell, exists = _tile_cells(batch, t, s, size)
        grad = _convolve(grad_conv, weight, batch, t, s, size, reach, K, PRECISION)
        grad += (1 - beta) * _load_tile(grad_a, batch, t, s, size)
        grad = _fill_tile(grad, mask, 0.0, batch, t, s, size, strides)
        tl.store(grad_logits + cell, (1 - alpha) * grad, mask=exists)
        tl.store(grad_prev + cell, alpha * grad, mask=exists)

    @triton.jit
    def _weight_backward_kernel(
        a_in,
        grad_conv,
        partial_sums,
        tiles,
        size,
        reach,
        K: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """One window cell's (H, H), summed over some of the tiles: partial_sums (., H, H, K, K)."""
        # The programs of one tile are neighbours, and all but one find it in the cache.
        window_cell, first = tl.program_id(0), tl.program_id(1)
        heads, above, left = size[0], reach[0], reach[1]
        total = tl.zeros((_LANES, _LANES), tl.float32)
        for tile in range(first, tiles, tl.num_programs(1)):
            batch, t, s = _tile(tile, size)
            grad = _load_tile(grad_conv, batch, t, s, size)
            t, s = t + window_cell // K - above, s + window_cell % K - left
            shifted = _load_tile(a_in, batch, t, s, size)
            total = tl.dot(grad, tl.trans(shifted), total, input_precision=PRECISION)
        head_out, head_in = tl.arange(0, _LANES)[:, None], tl.arange(0, _LANES)[None, :]
        of_heads = partial_sums + ((first * heads + head_out) * heads + head_in) * K * K
        tl.store(of_heads + window_cell, total, mask=(head_out < heads) & (head_in < heads))


def _reach(window: str, kernel_size: int) -> Tuple[int, int]:
    above = kernel_size // 2 if window == "bidirectional" else kernel_size - 1
    left = kernel_size - 1 if window == "causal" else kernel_size // 2
    return above, left


def _strides(mask: Optional[Tensor]) -> Tuple[int, ...]:
    return (0, 0, 0, 0) if mask is None else tuple(mask.stride())


def _num_tiles(maps: Tensor) -> int:
    batch, _, queries, keys = maps.shape
    return batch * triton.cdiv(queries, BLOCK_T) * triton.cdiv(keys, BLOCK_S)


def _row_blocks(maps: Tensor) -> Tuple[int, Dict[str, int]]:
    """The number of rows and the block sizes of a kernel by rows."""
    columns = min(triton.next_power_of_2(maps.size(-1)), ROW_CELLS)
    return maps[..., 0].numel(), {"ROWS": ROW_CELLS // columns, "COLUMNS": columns}


def _precision(*tensors: Tensor) -> str:
    # TF32 holds every float16 and bfloat16: their products lose nothing on the tensor cores.
    return "ieee" if any(tensor.dtype == torch.float32 for tensor in tensors) else "tf32"


class _Attend(torch.autograd.Function):
    """:func:`attend` by the kernels."""

    @staticmethod
    def forward(
        ctx,
        attn_logits: Tensor,
        prev_attn_logits: Tensor,
        weight: Tensor,
        bias: Tensor,
        *options: Any,
    ) -> Tuple[Tensor, Tensor]:
        alpha, beta, window, mask, hidden, dropout, seed = options
        alpha, beta, dropout = float(alpha), float(beta), float(dropout)
        attn_logits, prev_attn_logits = attn_logits.contiguous(), prev_attn_logits.contiguous()
        weight, bias = weight.contiguous(), bias.contiguous()
        mask, hidden = (x if x is None else x.expand(attn_logits.shape) for x in (mask, hidden))
        a_in, evolved, probs = (torch.empty_like(attn_logits) for _ in range(3))
        log_sums = torch.empty(a_in.shape[:-1], dtype=torch.float32, device=a_in.device)
        size, reach = tuple(a_in.shape[1:]), _reach(window, weight.size(-1))
        product = {"K": weight.size(-1), "PRECISION": _precision(a_in, weight)}
        product["num_warps"] = TILE_WARPS
        rows, blocks = _row_blocks(a_in)
        by_rows, by_tiles = (triton.cdiv(rows, blocks["ROWS"]),), (_num_tiles(a_in),)

        with torch.cuda.device_of(attn_logits):
            inputs = (attn_logits, prev_attn_logits, mask)
            _mix_kernel[by_rows](*inputs, a_in, alpha, rows, size, _strides(mask), **blocks)
            _evolve_kernel[by_tiles](a_in, weight, bias, evolved, beta, size, reach, **product)
            outputs, drop = (probs, log_sums), (dropout, seed)
            _softmax_kernel[by_rows](
                *(evolved, hidden, *outputs, *drop, rows, size, _strides(hidden)),
                DROPOUT=dropout > 0,
                **blocks,
            )

        ctx.save_for_backward(a_in, probs, log_sums, weight, bias, mask, hidden)
        ctx.options = alpha, beta, dropout, seed, size, reach, product
        ctx.set_materialize_grads(False)
        return evolved, probs

    @staticmethod
    @once_differentiable
    def backward(
        ctx, grad_evolved: Optional[Tensor], grad_probs: Optional[Tensor]
    ) -> Tuple[Optional[Tensor], ...]:
        a_in, probs, log_sums, weight, bias, mask, hidden = ctx.saved_tensors
        alpha, beta, dropout, seed, size, reach, product = ctx.options
        if grad_evolved is None and grad_probs is None:
            return (None,) * 11
        tiles = _num_tiles(a_in)
        grad_a, grad_conv, grad_logits, grad_prev = (torch.empty_like(a_in) for _ in range(4))

        dots = None  # what each row's probabilities have in common in the softmax's gradient
        if grad_probs is not None:
            grad_probs, dots = grad_probs.contiguous(), torch.empty_like(log_sums)
            rows, blocks = _row_blocks(a_in)
            by_rows = (triton.cdiv(rows, blocks["ROWS"]),)
            _row_dot_kernel[by_rows](probs, grad_probs, dots, rows, size[-1], **blocks)
        if grad_evolved is not None:
            grad_evolved = grad_evolved.contiguous()
        grads, drop = (grad_probs, grad_evolved, grad_a, grad_conv), (dropout, seed)
        _refine_backward_kernel[(tiles,)](
            *(a_in, weight, bias, hidden, log_sums, dots, *grads),
            *(beta, *drop, size, reach, _strides(hidden)),
            DROPOUT=dropout > 0,
            **product,
        )
        last = product["K"] - 1
        transposed = weight.transpose(0, 1).flip(2, 3).contiguous()
        _mix_backward_kernel[(tiles,)](
            *(grad_a, grad_conv, transposed, mask, grad_logits, grad_prev, alpha, beta),
            *(size, (last - reach[0], last - reach[1]), _strides(mask)),
            **product,
        )

        grad_weight = grad_bias = None
        if ctx.needs_input_grad[2]:
            # Every program has a sum of its own, and these are added up in one order always.
            window_cells = weight[0, 0].numel()
            splits = min(tiles, WEIGHT_PROGRAMS // window_cells)
            partial_sums = weight.new_empty((splits, *weight.shape), dtype=torch.float32)
            _weight_backward_kernel[(window_cells, splits)](
                *(a_in, grad_conv, partial_sums, tiles, size, reach),
                K=product["K"],
                PRECISION=_precision(a_in),
            )
            grad_weight = partial_sums.sum(0).to(weight.dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = grad_conv.sum((0, 2, 3), dtype=torch.float32).to(bias.dtype)
        return grad_logits, grad_prev, grad_weight, grad_bias, *(None,) * 7
