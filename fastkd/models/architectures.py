"""The students of arXiv 2511.15572: timm's ViT with a Lift as final norm, or a wide last block."""

# Annotations must be types, not text: torch.fx writes those of `forward` into the code it makes.

import math
from typing import Any, Literal, get_args

import torch
from timm.layers import LayerNorm, trunc_normal_
from timm.models import named_apply
from timm.models.vision_transformer import Block, VisionTransformer, get_init_weights_vit
from torch import Tensor, nn

from fastkd.losses.projectors import Lift, has_hooks
from fastkd.ops import lift as lift_tokens
from fastkd.ops.backend import Backend
from fastkd.ops.feature_kd.reference import LossName

# Pools that read patch tokens only; "" returns the tokens.
_LIFT_POOLS = ("avg", "avgmax", "max", "")

# How the new layers are initialized; see `create_student`.
InitWeights = Literal["released", "timm"]


class _WideFinalTransformer(VisionTransformer):
    """A timm ViT whose final features (`num_features`) are wider than its tokens (`embed_dim`)."""

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self.head = self._make_head()
        self.head.train(self.training)

    def _make_head(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        return nn.Linear(self.num_features, self.num_classes, **self._placement())

    def _placement(self) -> dict[str, Any]:
        parameter = next(self.parameters())
        return {"device": parameter.device, "dtype": parameter.dtype}

    def _set_final_width(self, width: int) -> None:
        self.num_features = self.head_hidden_size = width

    def _init_new(self, name: str) -> None:
        """Initialize a part that is made after construction as timm initializes the rest."""
        mode = self.weight_init_mode
        head_bias = -math.log(self.num_classes) if "nlhb" in mode else 0.0
        init = get_init_weights_vit(mode, head_bias)
        named_apply(init, self.get_submodule(name), name=name, include_root=True)


class LiftVisionTransformer(_WideFinalTransformer):
    """Lift (arXiv 2511.15572): the lifted, normalized patch tokens are distilled and classified.

    The tokens of the last block go through `Lift`, in the place of timm's final norm, and the head
    reads the mean over the lifted patch tokens; the class token is not pooled. With
    ``global_pool="avg"``, `forward` never writes the lifted tokens (`fastkd.ops.lift`); timm's
    other methods, tracers and exporters run the plain layers.

    Args:
        width: channels of the lifted tokens and of the head.
        global_pool: ``"avg"`` (the paper's), ``"avgmax"``, ``"max"`` over patch tokens, or ``""``.
        init_weights: ``"released"`` or ``"timm"``; see `create_student`.
        **kwargs: of timm's `VisionTransformer`; its final and pooled norms are replaced.

    Attributes:
        fused_lift: False runs the plain layers everywhere, which second derivatives and
            `torch.vmap` need.
    """

    fused_lift: bool = True
    __jit_unused_properties__ = ("lift",)  # TorchScript has its own type for every Lift

    def __init__(
        self,
        *,
        width: int = 384,
        global_pool: str = "avg",
        init_weights: InitWeights = "released",
        **kwargs: Any,
    ) -> None:
        check_lift_pool(global_pool)
        check_init_weights("LiftVisionTransformer", init_weights, kwargs.get("weight_init", ""))
        super().__init__(global_pool="avg", **kwargs)
        self._install_lift(width, global_pool, init_weights)

    @property
    def lift(self) -> Lift:
        """The projection and norm, which sit in timm's final norm slot."""
        return self.norm

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Logits [B, classes] of images ``x`` [B, C, H, W]; arguments as in timm."""
        if not torch.jit.is_scripting():  # noqa: SIM102 -- TorchScript would compile an `and`
            if self.fuses_lift(x):
                return self._forward_fused(x, attn_mask, is_causal)
        x = self.forward_features(x, attn_mask=attn_mask, is_causal=is_causal)
        return self.forward_head(x)

    def forward_head_kd(
        self,
        tokens: Tensor,
        teacher_tokens: Tensor,
        loss: LossName = "mse",
        *,
        grid: tuple[int, int] | None = None,
        beta: float = 1.0,
        backend: Backend = "auto",
    ) -> tuple[Tensor, Tensor]:
        """Compute logits, and the lifted tokens' distance to a teacher's, in one pass.

        Args:
            tokens: [B, N, embed_dim], patch tokens of the last block before the lift
                (``Taps.last_block``).
            teacher_tokens: [B, N, width], frozen.
            loss: of `fastkd.ops.lift_kd`.
            grid: (H, W) with H * W = N; needed by ``"spectral"`` where it is not square.
            beta: threshold of ``"smooth_l1"``.
            backend: of the operator.

        Returns:
            [B, classes], and the scalar distance.

        Raises:
            ValueError: shapes, grid or options do not fit, or `fuses_lift` is False.
        """
        if not self.fuses_lift(tokens):
            raise ValueError(
                "LiftVisionTransformer.forward_head_kd: needs global_pool='avg', fused_lift=True "
                "and a lift without hooks or exchanged layers; otherwise compare the lifted tokens "
                "of forward_features by feature_kd"
            )
        if tokens.ndim != 3 or tokens.shape[2] != self.embed_dim:
            raise ValueError(
                f"LiftVisionTransformer.forward_head_kd: tokens must be [B, N, {self.embed_dim}], "
                "patch tokens of the last block, not yet lifted (Taps.last_block gives them), "
                f"got {list(tokens.shape)}"
            )
        distance, pooled = self.lift.compare(
            tokens, teacher_tokens, loss, grid=grid, beta=beta, pool=True, backend=backend
        )
        return self._classify(pooled), distance

    def fuses_lift(self, x: Tensor) -> bool:
        """Whether logits are computed without writing the lifted tokens.

        Args:
            x: the input of the pass; tracers and meta tensors take the plain layers.

        Returns:
            False where the layers have hooks, or are not the Lift's own.
        """
        return (
            self.fused_lift
            and not _is_recorded(x)
            and not x.is_meta
            and self.global_pool == "avg"
            and isinstance(self.norm, Lift)
            and self.norm.is_fusible()
            and not has_hooks(self.blocks)  # which the fused pass runs one by one
        )

    def _forward_fused(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        masked = {"attn_mask": attn_mask, "is_causal": is_causal}
        (tokens,) = self.forward_intermediates(
            x, indices=1, norm=False, output_fmt="NLC", intermediates_only=True, **masked
        )
        return self._classify(lift_tokens(tokens, **self.lift.operands(), pool=True))

    def _classify(self, pooled: Tensor) -> Tensor:
        """Do what timm's `forward_head` does after the pool."""
        return self.head(self.head_drop(self.fc_norm(pooled)))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is not None:
            check_lift_pool(global_pool)
        super().reset_classifier(num_classes, global_pool)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        kept = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_norm:  # which is the lift
            self._set_final_width(self.embed_dim)
        return kept

    def _install_lift(self, width: int, global_pool: str, init_weights: InitWeights) -> None:
        self.norm = Lift(self.embed_dim, width, **self._placement())
        self.fc_norm = nn.Identity()
        self.attn_pool = None
        self.global_pool = global_pool
        self.pool_include_prefix = False
        self._set_final_width(width)
        self.head = self._make_head()
        for info in self.feature_info:
            info["num_chs_norm"] = width  # what forward_intermediates(norm=True) yields
        if init_weights == "timm":  # else the layers keep what torch draws for a new nn.Linear
            self._init_new("norm")
            self._init_new("head")


def into_lift(
    vit: VisionTransformer,
    width: int = 384,
    global_pool: str = "avg",
    init_weights: InitWeights = "released",
) -> LiftVisionTransformer:
    """Turn a timm ViT into a Lift student in place, keeping all but its norm, pooling and head."""
    vit.__class__ = LiftVisionTransformer
    vit._install_lift(width, global_pool, init_weights)
    return vit


def _is_recorded(x: Tensor) -> bool:
    """Whether the pass is traced or exported, to run where the operators may not be known."""
    tracing = torch.jit.is_tracing()
    return isinstance(x, torch.fx.Proxy) or tracing or _is_exporting()


@torch.compiler.assume_constant_result  # torch 2.11's compiler returns True in any case
def _is_exporting() -> bool:
    return torch.compiler.is_exporting()


def check_lift_pool(global_pool: str) -> None:
    if global_pool not in _LIFT_POOLS:
        raise ValueError(
            f"LiftVisionTransformer: global_pool must be one of {_LIFT_POOLS}, got {global_pool!r} "
            "(the class token is not lifted)"
        )


def check_init_weights(caller: str, init_weights: str, weight_init: str = "") -> None:
    """Refuse an unknown ``init_weights``, and the released one beside a scheme of timm."""
    if init_weights not in get_args(InitWeights):
        raise ValueError(
            f"{caller}: init_weights must be one of {get_args(InitWeights)}, got {init_weights!r}"
        )
    if init_weights == "released" and weight_init not in ("", "skip", "reset"):
        raise ValueError(
            f"{caller}: {weight_init=} needs init_weights='timm', got {init_weights!r}"
        )


class WideLastBlock(Block):
    """timm's transformer block at a new width, entered through a Linear without bias and a norm.

    Args:
        dim_in: channels of the incoming tokens.
        dim: channels inside the block and of its output.
        norm_layer: of the entry and of the block.
        device: where the parameters are made.
        dtype: their dtype.
        **kwargs: of timm's `Block`.
    """

    def __init__(
        self,
        dim_in: int,
        dim: int,
        *,
        norm_layer: type[nn.Module] = LayerNorm,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, norm_layer=norm_layer, device=device, dtype=dtype, **kwargs)
        self.proj_in = nn.Linear(dim_in, dim, bias=False, device=device, dtype=dtype)
        self.proj_norm = norm_layer(dim, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Map ``x`` from [B, N, dim_in] to [B, N, dim]; arguments as in timm's block."""
        x = self.proj_norm(self.proj_in(x))
        # From here on timm's block, written out: TorchScript has no super().
        attended = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x = x + self.drop_path1(self.ls1(attended))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class WideLastVisionTransformer(_WideFinalTransformer):
    """WideLast (arXiv 2511.15572): last block, final norm and head have the teacher's width.

    The last block keeps the head dimension and so has more heads. Parameters are named as in the
    released checkpoints (``blocks.11.proj_in.weight``).

    Args:
        width: channels of the last block, a multiple of the head dimension.
        block_fn: timm's `Block`; no other kind has a wide form.
        init_weights: ``"released"`` or ``"timm"``; see `create_student`.
        **kwargs: of timm's `VisionTransformer`.
    """

    def __init__(
        self,
        *,
        width: int = 384,
        block_fn: type[nn.Module] = Block,
        init_weights: InitWeights = "released",
        **kwargs: Any,
    ) -> None:
        check_wide_block_type(block_fn)
        check_init_weights("WideLastVisionTransformer", init_weights, kwargs.get("weight_init", ""))
        recorder = BlockRecorder()
        super().__init__(block_fn=recorder, **kwargs)
        self._install_wide_block(width, recorder.arguments, init_weights)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        kept = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if not isinstance(self.blocks[-1], WideLastBlock):  # the norm fits no other block
            self.norm = nn.Identity()
            self._set_final_width(self.embed_dim)
        return kept

    def _install_wide_block(
        self, width: int, block_arguments: dict[str, Any], init_weights: InitWeights
    ) -> None:
        if self.attn_pool is not None:
            raise ValueError(
                f"WideLastVisionTransformer: global_pool={self.global_pool!r} pools by attention "
                f"at {self.embed_dim} channels; choose global_pool='token' or 'avg'"
            )
        arguments = widened(block_arguments, width) | self._placement()
        last = len(self.blocks) - 1
        self.blocks[last] = WideLastBlock(self.embed_dim, **arguments)
        self.feature_info[last]["num_chs"] = width
        self._set_final_width(width)
        new = [f"blocks.{last}", "head"]
        for slot in ("norm", "fc_norm"):
            if not isinstance(getattr(self, slot), nn.Identity):
                setattr(self, slot, arguments["norm_layer"](width, **self._placement()))
                new.append(slot)
        self.head = self._make_head()
        for name in new:
            self._init_new(name)
        if init_weights == "released" and self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)


def into_widelast(
    vit: VisionTransformer,
    block_arguments: dict[str, Any],
    width: int = 384,
    init_weights: InitWeights = "timm",
) -> WideLastVisionTransformer:
    """Turn a timm ViT into a WideLast student in place, keeping all before its last block.

    ``init_weights="released"`` also initializes the class token anew, for an untrained model.
    """
    vit.__class__ = WideLastVisionTransformer
    vit._install_wide_block(width, block_arguments, init_weights)
    return vit


class BlockRecorder:
    """A ``block_fn`` that builds timm's blocks and keeps the arguments of the last one."""

    def __init__(self) -> None:
        self.arguments: dict[str, Any] = {}

    def __call__(self, **arguments: Any) -> Block:
        self.arguments = arguments
        return Block(**arguments)


def check_wide_block_type(block_type: type[nn.Module]) -> None:
    if block_type is not Block:
        raise ValueError(
            "WideLastVisionTransformer: the last block must be timm's Block to have a wide form, "
            f"got {block_type.__name__}"
        )


def widened(block_arguments: dict[str, Any], width: int) -> dict[str, Any]:
    """Get the arguments of a block at another width, with the dimension of its heads kept."""
    head_dim = block_arguments["dim"] // block_arguments["num_heads"]
    if width <= 0 or width % head_dim:
        raise ValueError(
            "WideLastVisionTransformer: width must be a multiple of the head dimension "
            f"{head_dim}, got {width}"
        )
    return block_arguments | {"dim": width, "num_heads": width // head_dim}
