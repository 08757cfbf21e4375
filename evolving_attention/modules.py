"""The evolving part of one attention layer: its weights, its options and its decoding step."""

import math
from typing import (
    TYPE_CHECKING,
    Any,
    Collection,
    Dict,
    Final,
    List,
    Mapping,
    Optional,
    Tuple,
    Union,
)

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evolving_attention.checks import (
    can_be_read,
    check_count,
    check_flag,
    check_heads,
    check_maps,
    check_options,
    check_rows,
    check_unmasked,
    check_window,
)
from evolving_attention.functional import mix, refine

# Functions that inspect shapes or types must be nodes of their own in torch.fx's graphs.
for function in ("check_heads", "check_maps", "check_window", "mix", "refine"):
    torch.fx.wrap(function)


class AttentionEvolution(nn.Module):
    """Evolves one layer's attention map from that of the previous layer (paper, equations 1, 2).

    The first layer of a stack has no previous map and needs no such module: it hands on its plain
    logits.

    Args:
        num_heads: heads H of the layer, which are the channels of the convolution.
        alpha: weight of the previous map, in [0, 1]; 0 is the paper's ablation without residual.
        beta: weight of the convolution, in [0, 1]; at 0, unless learned, there is no convolution.
        kernel_size: K, odd; the paper's ablations use 1, 3 and 5.
        window: "bidirectional", "causal" or "cross", see :func:`evolving_attention.evolve`.
        learnable: learn this layer's alpha and beta, starting from the given values.

    Attributes:
        weight, bias: of the convolution, (H, H, K, K) and (H,), or None without one.
        alpha, beta: tensors of shape (1,) in the state dict: parameters if learnable, else buffers,
            which record the numbers that the weights were trained with.
        mixing: alpha and beta as numbers; the initial ones if learnable.

    Raises:
        ValueError: an argument out of range; the message names it.
    """

    checked = False  # whether the values of an earlier call were checked
    learnable: Final[bool]
    num_heads: Final[int]
    window: Final[str]
    alpha: Tensor
    beta: Tensor
    if TYPE_CHECKING:  # TorchScript would take them for optional even in a layer that has them
        weight: Optional[nn.Parameter]
        bias: Optional[nn.Parameter]

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
        check_flag("learnable", learnable)
        check_window(window)
        check_count("num_heads", num_heads)
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.window = window
        self.learnable = bool(learnable)
        self.mixing = (float(alpha), float(beta))
        factory: Dict[str, Any] = {"device": device, "dtype": dtype}
        for name in ("alpha", "beta"):
            if learnable:
                self.register_parameter(name, nn.Parameter(torch.empty(1, **factory)))
            else:
                self.register_buffer(name, torch.empty(1, device=device, dtype=torch.float32))
        if learnable or beta > 0:
            shape = (num_heads, num_heads, kernel_size, kernel_size)
            self.weight = nn.Parameter(torch.empty(shape, **factory))
            self.bias = nn.Parameter(torch.empty(num_heads, **factory))
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the convolution as :class:`torch.nn.Conv2d` does; resets alpha and beta."""
        self.reset_mixing()
        if self.weight is not None and self.bias is not None:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def reset_mixing(self) -> None:
        """Sets alpha and beta to their initial values."""
        nn.init.constant_(self.alpha, self.mixing[0])
        nn.init.constant_(self.beta, self.mixing[1])

    def forward(
        self,
        attn_logits: Tensor,
        prev_attn_logits: Tensor,
        mask: Optional[Tensor] = None,
        window: Optional[str] = None,
    ) -> Tensor:
        """The evolved map (B, H, T, S); arguments as in :func:`evolving_attention.evolve`.

        `window` is for this call only; None means the module's own.
        """
        window = self.window if window is None else window
        if not torch.jit.is_scripting():
            check_window(window)
        a_in, beta = self.mix(attn_logits, prev_attn_logits, mask)
        return refine(a_in, self.weight, self.bias, beta, window)

    def step(
        self,
        attn_logits: Tensor,
        prev_attn_logits: Tensor,
        mask: Optional[Tensor] = None,
        rows: Optional[Tensor] = None,
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """The evolved map of the next T queries, (B, H, T, S), for incremental decoding.

        Also takes and returns the last K - 1 rows of A_in, (B, H, K - 1, S or fewer), which are
        None at the start and without convolution. They belong to the cache of a decoder and must
        be reordered with it. The steps together equal :meth:`forward` over the whole map.

        Raises:
            ValueError: as in :func:`evolving_attention.evolve`; or the module's window reads later
                rows; or `rows` belong to another kernel size, batch, number of heads or dtype, or
                have more keys than the map.
        """
        if self.window == "bidirectional":
            raise ValueError(
                "window must be causal or cross for step(): bidirectional reads later rows"
            )
        a_in, beta = self.mix(attn_logits, prev_attn_logits, mask)
        if self.weight is None:
            return a_in, None
        count = self.weight.size(2) - 1
        if rows is None:
            rows = a_in.new_zeros([a_in.size(0), a_in.size(1), count, a_in.size(3)])
        check_rows(rows, count, a_in)
        # For earlier queries, the keys that were added since are in the future: zero.
        rows = F.pad(rows, (0, a_in.size(3) - rows.size(3)))  # (B, H, K - 1, S)
        evolved = refine(a_in, self.weight, self.bias, beta, self.window, rows)
        rows = torch.cat([rows, a_in], dim=2)  # (B, H, K - 1 + T, S)
        # The last K - 1, as a copy: a view would keep all of A_in in memory.
        return evolved, rows[:, :, rows.size(2) - count :].clone()

    def mix(
        self, attn_logits: Tensor, prev_attn_logits: Tensor, mask: Optional[Tensor]
    ) -> Tuple[Tensor, Union[float, Tensor]]:
        """A_in of checked maps, (B, H, T, S), and beta."""
        check_maps(attn_logits, prev_attn_logits, mask)
        check_heads(attn_logits, self.num_heads)
        if not torch.jit.is_scripting():
            self.check_values(attn_logits, prev_attn_logits, mask)
        alpha, beta = self.mixing_weights()
        return mix(attn_logits, prev_attn_logits, alpha, mask), beta

    @torch.jit.unused
    def check_values(
        self, attn_logits: Tensor, prev_attn_logits: Tensor, mask: Optional[Tensor]
    ) -> None:
        """Raises ValueError if the maps are masked, see :func:`checks.check_unmasked`.

        Graphs are never checked. Elsewhere than on a CPU, reading a value waits for the device, so
        only a layer's first call is checked.
        """
        if can_be_read(attn_logits) and (attn_logits.is_cpu or not self.checked):
            check_unmasked(attn_logits, prev_attn_logits, mask, self.learnable)
            self.checked = True

    def mixing_weights(self) -> Tuple[Union[float, Tensor], Union[float, Tensor]]:
        """alpha and beta for use: numbers, or tensors of shape (1,) if learnable."""
        if self.learnable:
            return _unit(self.alpha), _unit(self.beta)
        return self.mixing[0], self.mixing[1]

    def extra_repr(self) -> str:
        text = f"{self.num_heads}, kernel_size={self.kernel_size}, window={self.window!r}"
        if self.learnable:
            return f"{text}, learnable=True"
        return f"{text}, alpha={self.mixing[0]}, beta={self.mixing[1]}"

    def adopt(
        self, state_dict: Mapping[str, Tensor], prefix: str, options: Collection[str]
    ) -> None:
        """Changes options to those that a checkpoint was trained with, before it is loaded.

        Args:
            state_dict: the checkpoint.
            prefix: of this module's names in it.
            options: which of "alpha", "beta" and "kernel_size" to change. Options that the
                checkpoint does not have stay; learnable alpha and beta are loaded as weights.
        """
        weight = state_dict.get(f"{prefix}weight")
        if not self.learnable:
            alpha, beta = (
                shortest_number(state_dict[f"{prefix}{name}"])
                if name in options and is_number(state_dict.get(f"{prefix}{name}"), finite=True)
                else number
                for name, number in zip(("alpha", "beta"), self.mixing, strict=True)
            )
            self.mixing = (alpha, beta)
            if "beta" in options and beta == 0 and weight is None:
                self.weight = self.bias = None
            elif "beta" in options and weight is not None and self.weight is None:
                self.weight = nn.Parameter(self.alpha.new_empty(weight.shape))
                self.bias = nn.Parameter(self.alpha.new_empty(self.num_heads))
        if "kernel_size" in options and weight is not None and self.weight is not None:
            # The parameter stays the same object, since an optimiser may hold it already.
            self.weight.data = self.weight.new_empty(*self.weight.shape[:2], *weight.shape[2:])
            self.kernel_size = weight.size(-1)

    def _load_from_state_dict(
        self,
        state_dict: Dict[str, Tensor],
        prefix: str,
        local_metadata: Dict[str, Any],
        strict: bool,
        missing_keys: List[str],
        unexpected_keys: List[str],
        error_msgs: List[str],
    ) -> None:
        """Refuses weights of another alpha, beta, number of heads or kernel size.

        A checkpoint without alpha and beta loads too, such as one of version 0.1.0; and, to learn
        both, one with a beta of 0, and thus without a convolution.
        """
        convolves = f"{prefix}weight" in state_dict
        for name, number in zip(("alpha", "beta"), self.mixing, strict=True):
            key = f"{prefix}{name}"
            stored = state_dict.get(key)
            if stored is None:
                if convolves or not self.learnable:
                    state_dict[key] = torch.tensor([number])
            elif not self.learnable and is_number(stored):
                stored = stored.clamp(0.0, 1.0)  # a learned one may lie outside
                dtype = getattr(self, name).dtype
                if not (is_rounded(number, stored) or is_average(number, stored, dtype)):
                    error_msgs.append(
                        f"{key} is {shortest_number(stored)} in the checkpoint, but this model was "
                        f"made with {name}={number}: make it with "
                        f"{name}={shortest_number(stored)}, or with learnable=True if it was "
                        "learned"
                    )
                state_dict[key] = torch.tensor([number], device=stored.device)
        names = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
        if self.learnable and names == {"alpha", "beta"}:
            beta = state_dict[f"{prefix}beta"]
            if is_number(beta) and beta.item() == 0:
                # Trained without a convolution: it begins anew, and the learned beta at 0.
                for name in ("weight", "bias"):
                    state_dict[f"{prefix}{name}"] = getattr(self, name).detach()
        if convolves and self.weight is not None:
            heads, *_, kernel_size = state_dict[f"{prefix}weight"].shape
            for name, own, given in (
                ("num_heads", self.num_heads, heads),
                ("kernel_size", self.kernel_size, kernel_size),
            ):
                if given != own:
                    error_msgs.append(
                        f"{prefix}weight was trained with {name}={given}, but this model was made "
                        f"with {name}={own}"
                    )
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )


def is_number(stored: Optional[Tensor], finite: bool = False) -> bool:
    """Whether an entry of a checkpoint exists and is one number, and if asked for, a finite one."""
    if stored is None or stored.numel() != 1 or stored.is_meta:
        return False
    return not finite or bool(stored.isfinite())


def is_average(number: float, stored: Tensor, dtype: torch.dtype) -> bool:
    """Whether `stored`, of one element, may be a moving average of `number` in half precision.

    fairseq computes the average in float32 and loads it into a model of `dtype` at each update. It
    drifts by one rounding at a time; together with the number's own rounding, by less than 0.4 %.
    """
    in_half = dtype in (torch.float16, torch.bfloat16)
    return in_half and abs(stored.item() - number) <= 4e-3 * number


def is_rounded(number: float, stored: Tensor) -> bool:
    """Whether `stored`, of one element, is `number` in some floating-point precision.

    A moving average in float32 of a number in float32 may differ by a few roundings.
    """
    value = stored.item()
    exact = torch.tensor(number, dtype=torch.float64, device="cpu")
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    return any(math.isclose(exact.to(dtype).item(), value, rel_tol=1e-6) for dtype in dtypes)


def shortest_number(stored: Tensor) -> float:
    """The number with the fewest digits that rounds to `stored`, of one element; NaN is kept."""
    value = stored.clamp(0.0, 1.0).item()
    if math.isnan(value):
        return value
    numbers = (float(f"{value:.{digits}g}") for digits in range(1, 18))
    return next(number for number in numbers if is_rounded(number, stored.clamp(0.0, 1.0)))


def _unit(x: Tensor) -> Tensor:
    """Clamps a learned mixing weight to [0, 1], and passes its gradient through unchanged.

    Outside [0, 1] the gradient of a plain clamp is 0: a weight that an optimiser's momentum carried
    below 0 would stay there for good.
    """
    return x + (x.clamp(0.0, 1.0) - x).detach()
