"""The evolving part of one attention layer: its weights, its options, its one decoding step."""

import math
from numbers import Integral
from typing import Final, Optional, Tuple, Union

import torch
from torch import Tensor, nn

from evolving_attention import functional
from evolving_attention.functional import check_maps, mix_and_refine

# What asks for the shape or the type of a value is a node of its own in torch.fx's graphs.
for function in ("check_maps", "mix_and_refine", "_window", "_unit"):
    torch.fx.wrap(function)


class UnitInterval(torch.autograd.Function):
    """Clamps a learned mixing weight to [0, 1] and lets only gradients that lead back in pass.

    A plain clamp has no gradient outside, so a weight that an optimiser's momentum carried
    below 0 would stay at 0 for good.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clamp(0.0, 1.0)

    @staticmethod
    def setup_context(ctx, inputs: Tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        outward = ((x < 0) & (grad > 0)) | ((x > 1) & (grad < 0))
        return grad.masked_fill(outward, 0.0)


class AttentionEvolution(nn.Module):
    """Evolves one attention layer's map from the map of the layer before (paper, equations 1, 2).

    The first layer of a stack has no map to evolve from and needs no such module: it hands on
    its plain logits.

    Args:
        num_heads: heads H of the layer; they are the channels of the convolution.
        alpha: weight of the previous map, in [0, 1]; 0 is the paper's ablation without residual.
        beta: weight of the convolution, in [0, 1]; 0, unless learned, makes no convolution.
        kernel_size: K, odd; the paper's ablations use 1, 3 and 5.
        window: "bidirectional", "causal" or "cross", see :func:`evolving_attention.evolve`.
        learnable: learn alpha and beta, from the given values on, one of each for the layer.

    Attributes:
        weight, bias: the convolution's (H, H, K, K) and (H,), or None without one.
        alpha, beta: the numbers given, or parameters of shape (1,) if learnable.

    Raises:
        ValueError: an argument out of range; the message names it.
    """

    learnable: Final[bool]
    num_heads: Final[int]
    window: Final[str]

    def __init__(
        self,
        num_heads: int,
        alpha: float,
        beta: float,
        kernel_size: int = 3,
        window: str = "bidirectional",
        learnable: bool = False,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        check_options(alpha, beta, kernel_size)
        functional.check_window(window)
        if not isinstance(num_heads, Integral) or num_heads < 1:
            raise ValueError(f"num_heads must be 1 or more, got {num_heads!r}")
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.window = window
        self.learnable = learnable
        factory = {"device": device, "dtype": dtype}
        self.initial_mixing = (float(alpha), float(beta))
        if learnable:
            self.alpha = nn.Parameter(torch.empty(1, **factory))
            self.beta = nn.Parameter(torch.empty(1, **factory))
        else:
            self.alpha, self.beta = self.initial_mixing
        if learnable or beta > 0:
            shape = (num_heads, num_heads, kernel_size, kernel_size)
            self.weight = nn.Parameter(torch.empty(shape, **factory))
            self.bias = nn.Parameter(torch.empty(num_heads, **factory))
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the convolution anew, as :class:`torch.nn.Conv2d` does; alpha, beta start anew."""
        if self.learnable:
            nn.init.constant_(self.alpha, self.initial_mixing[0])
            nn.init.constant_(self.beta, self.initial_mixing[1])
        if self.weight is not None:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self,
        attn_logits: Tensor,
        prev_attn_logits: Tensor,
        mask: Optional[Tensor] = None,
        window: Optional[str] = None,
    ) -> Tensor:
        """The evolved map (B, H, T, S); arguments as in :func:`evolving_attention.evolve`.

        `window` is that of this call alone, None the module's own.
        """
        check_maps(attn_logits, prev_attn_logits, mask, self.num_heads)
        window = _window(window, self.window)
        alpha, beta = self.mixing_weights(attn_logits)
        return mix_and_refine(
            attn_logits, prev_attn_logits, self.weight, self.bias, alpha, beta, window, mask
        )

    def step(
        self,
        attn_logits: Tensor,
        prev_attn_logits: Tensor,
        mask: Optional[Tensor] = None,
        rows: Optional[Tensor] = None,
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """The evolved map of the next queries alone, for incremental decoding.

        Takes and returns besides, per sequence, the last K - 1 rows of A_in: (B, H, K - 1, S),
        None at the start and without convolution. Equal to :meth:`forward` over the whole map.
        """
        check_maps(attn_logits, prev_attn_logits, mask, self.num_heads)
        if self.window == "bidirectional":
            raise ValueError(
                "window must be causal or cross to go step by step, bidirectional looks ahead"
            )
        alpha, beta = self.mixing_weights(attn_logits)
        return functional.step(
            attn_logits,
            prev_attn_logits,
            self.weight,
            self.bias,
            alpha,
            beta,
            self.window,
            mask,
            rows,
        )

    def mixing_weights(self, like: Tensor) -> Tuple[Union[float, Tensor], Union[float, Tensor]]:
        """alpha and beta as they are used: numbers, or tensors of `like`'s dtype if learnable."""
        if self.learnable:
            return _unit(self.alpha).to(like.dtype), _unit(self.beta).to(like.dtype)
        return self.alpha, self.beta

    def extra_repr(self) -> str:
        text = f"{self.num_heads}, kernel_size={self.kernel_size}, window={self.window!r}"
        if self.learnable:
            return f"{text}, learnable=True"
        return f"{text}, alpha={self.alpha}, beta={self.beta}"


def _window(of_call: Optional[str], of_module: str) -> str:
    if of_call is None:
        return of_module
    if not torch.jit.is_scripting():
        functional.check_window(of_call)
    return of_call


def _unit(x: Tensor) -> Tensor:
    # TorchScript's files hold no function of Python's. A clamp has no gradient at 0 and 1 either,
    # where most weights start, so it lets all gradients pass.
    if torch.jit.is_scripting() or torch.jit.is_tracing():
        return x + (x.clamp(0.0, 1.0) - x).detach()
    return UnitInterval.apply(x)


def check_options(alpha: float, beta: float, kernel_size: int) -> None:
    """Raises ValueError, naming the argument, unless alpha, beta and kernel_size are in range."""
    functional.check_unit_interval("alpha", alpha)
    functional.check_unit_interval("beta", beta)
    functional.check_kernel_size("kernel_size", kernel_size)
