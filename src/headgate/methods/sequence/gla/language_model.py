"""The language model in the form that users of transformers expect.

Labels give a loss, ``generate`` decodes greedily, by sampling or by beam search in constant time and memory per token,
``from_pretrained`` and ``save_pretrained`` read and write safetensors, and the configuration takes the keys of the
published ones, so that published checkpoints load by their names. This is the only file of the room that needs
transformers; :class:`GLAModel` is the same network without it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from headgate.errors import MissingExtraError
from headgate.methods.sequence.gla.cache import GLACache
from headgate.methods.sequence.gla.initialization import initialize
from headgate.methods.sequence.gla.layer import Variant
from headgate.methods.sequence.gla.model import GLAModel
from headgate.methods.sequence.gla.official import KEY_PATTERNS, convert_model_state_dict, infer_config
from headgate.nn import swiglu_size
from headgate.validate import check_integer, check_shape

try:
    from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast
except ImportError as error:
    raise MissingExtraError("transformers", "language", "GLAForCausalLM") from error
if not hasattr(CausalLMOutputWithPast, "cache"):  # older releases call it past_key_values, and generate does, too
    raise MissingExtraError("transformers>=5.24", "language", "GLAForCausalLM")

__all__ = ["GLAConfig", "GLAForCausalLM", "gla_language_model"]


class GLAConfig(PretrainedConfig):
    """The sizes and options of :class:`GLAForCausalLM`, under the names of flash-linear-attention's configuration.

    Options there that choose among implementations of one function (``attn_mode``, ``fuse_norm`` …) are kept and not
    looked at.

    Args:
        hidden_size: channels of the residual stream.
        expand_k: channels of all keys over ``hidden_size``.
        expand_v: channels of all values over ``hidden_size``.
        hidden_ratio: width of the SwiGLU over ``hidden_size``, before two thirds of it are taken; ``None`` is 4.
        intermediate_size: that width itself; ``None`` to compute it.
        num_hidden_layers: blocks.
        num_heads: heads.
        num_kv_heads: heads of keys, values and gates; default ``num_heads``.
        feature_map: function of queries and keys; ``None`` for the identity.
        use_short_conv: short convolutions behind the projections of queries, keys and values.
        conv_size: their taps.
        conv_bias: whether they have biases.
        use_output_gate: whether the normed outputs are gated.
        clamp_min: smallest log gate; ``None`` for no limit.
        gate_low_rank_dim: width of the gate's bottleneck.
        gate_logit_normalizer: temperature of the gate.
        hidden_act: function of the output gate and of the SwiGLU; swish (silu) alone is on offer, as in the published
            code.
        elementwise_affine: whether the heads' norm has weights.
        norm_eps: ε of all norms.
        variant: ``"fla"`` or ``"first_release"``, see :class:`GatedLinearAttention`.
        vocab_size: number of token ids.
        use_cache: whether a model in evaluation mode returns its states.
        tie_word_embeddings: whether the output layer shares the token embedding.
        initializer_range: standard deviation at which weights start.
        pad_token_id: id of padding.
        bos_token_id: id of the beginning of a text.
        eos_token_id: id of the end of a text.
        **kwargs: anything else that transformers keeps in a configuration.

    Raises:
        ValueError: an option that changes the function and is not on offer: softmax attention in some blocks
            (``attn``), another ``hidden_act``, or the logits' penalty ``use_l2warp``.
    """

    model_type = "gla"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {"num_attention_heads": "num_heads"}

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        hidden_ratio: int | None = 4,
        intermediate_size: int | None = None,
        num_hidden_layers: int = 24,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        feature_map: str | None = None,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        use_output_gate: bool = True,
        clamp_min: float | None = None,
        gate_low_rank_dim: int = 16,
        gate_logit_normalizer: float = 16,
        hidden_act: str = "swish",
        elementwise_affine: bool = True,
        norm_eps: float = 1e-6,
        variant: Variant = "fla",
        vocab_size: int = 32000,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        initializer_range: float = 0.02,
        pad_token_id: int | None = None,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("attn") is not None:
            raise ValueError(
                f"attn must be None, softmax attention in some blocks is not on offer; got {kwargs['attn']}"
            )
        if kwargs.get("use_l2warp"):
            raise ValueError("use_l2warp must be False: the penalty on the logits is not on offer")
        if hidden_act not in ("swish", "silu"):
            raise ValueError(f"hidden_act must be 'swish' or 'silu', got {hidden_act!r}")
        self.hidden_size = hidden_size
        self.expand_k = expand_k
        self.expand_v = expand_v
        self.hidden_ratio = hidden_ratio
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.feature_map = feature_map
        self.use_short_conv = use_short_conv
        self.conv_size = conv_size
        self.conv_bias = conv_bias
        self.use_output_gate = use_output_gate
        self.clamp_min = clamp_min
        self.gate_low_rank_dim = gate_low_rank_dim
        self.gate_logit_normalizer = gate_logit_normalizer
        self.hidden_act = hidden_act
        self.elementwise_affine = elementwise_affine
        self.norm_eps = norm_eps
        self.variant = variant
        self.vocab_size = vocab_size
        self.use_cache = use_cache
        self.initializer_range = initializer_range
        ids = {"pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        super().__init__(**{"tie_word_embeddings": tie_word_embeddings, **ids, **kwargs})

    def build(self) -> GLAModel:
        """The backbone of this configuration, freshly initialised."""
        width = self.intermediate_size
        return GLAModel(
            self.vocab_size,
            self.hidden_size,
            self.num_hidden_layers,
            self.num_heads,
            swiglu_size(self.hidden_size, self.hidden_ratio or 4) if width is None else width,
            norm_eps=self.norm_eps,
            padding_idx=self.pad_token_id,
            expand_k=self.expand_k,
            expand_v=self.expand_v,
            num_kv_heads=self.num_kv_heads,
            feature_map=self.feature_map,
            use_short_conv=self.use_short_conv,
            conv_size=self.conv_size,
            conv_bias=self.conv_bias,
            use_output_gate=self.use_output_gate,
            gate_fn=self.hidden_act,
            gate_low_rank_dim=self.gate_low_rank_dim,
            gate_logit_normalizer=self.gate_logit_normalizer,
            clamp_min=self.clamp_min,
            elementwise_affine=self.elementwise_affine,
            variant=self.variant,
        )


class GLAForCausalLM(PreTrainedModel, GenerationMixin):
    """Gated linear attention language model (Yang et al., arXiv 2312.06635) for transformers.

    To load it through that library's own door, register it there once::

        AutoConfig.register("gla", GLAConfig)
        AutoModelForCausalLM.register(GLAConfig, GLAForCausalLM)

    Args:
        config: sizes and options.

    Example:
        >>> model = GLAForCausalLM(GLAConfig(hidden_size=64, num_hidden_layers=2, num_heads=2, vocab_size=100))
        >>> prompt = torch.randint(100, (1, 8))
        >>> loss = model(prompt, labels=prompt).loss
        >>> text = model.generate(prompt, max_new_tokens=16, do_sample=False)
    """

    config_class = GLAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _input_embed_layer = "embeddings"
    _is_stateful = True
    _no_split_modules = ["GLABlock"]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: GLAConfig) -> None:
        super().__init__(config)
        self.model = config.build()
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> GLAForCausalLM:
        """Load a folder or a repository of the Hugging Face hub: one that ``save_pretrained`` wrote, or a published one.

        The names that flash-linear-attention gives to weights are understood as well as ours, so
        ``from_pretrained("fla-hub/gla-340M-15B")`` works.

        Args:
            pretrained_model_name_or_path: folder or repository.
            *args: handed to transformers.
            **kwargs: the same; ``use_safetensors`` is on unless given.

        Returns:
            The model in evaluation mode.
        """
        kwargs.setdefault("key_mapping", dict(KEY_PATTERNS))
        kwargs.setdefault("use_safetensors", True)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # Else transformers would undo the renaming when it saves.
        model._weight_conversions = []
        return loaded

    @classmethod
    def from_fla_state_dict(cls, state: Mapping[str, Tensor], config: GLAConfig | None = None) -> GLAForCausalLM:
        """Build the model that a state dict of flash-linear-attention belongs to, and load it.

        Args:
            state: the official ``GLAForCausalLM``'s ``state_dict()``.
            config: its configuration; ``None`` to read the sizes off the weights. What weights do not show
                (``norm_eps``, ``clamp_min``, ``feature_map``, ``gate_logit_normalizer``, token ids) then has the
                official default.

        Returns:
            The model, in evaluation mode and in the dtype of the weights.

        Raises:
            ValueError: the weights are no such model's, are those of the first release, or do not fit ``config``.
        """
        config = GLAConfig(**infer_config(state)) if config is None else config
        weights = convert_model_state_dict(state, config.variant)
        if config.tie_word_embeddings:
            weights.setdefault("lm_head.weight", weights["model.embeddings.weight"])
        with torch.device("meta"):
            model = cls(config)
        try:
            model.load_state_dict({name: value.clone() for name, value in weights.items()}, assign=True)
        except RuntimeError as error:
            raise ValueError(f"state must fit the configuration: {error}") from error
        model.tie_weights()
        return model.eval()

    def forward(
        self,
        input_ids: Int[Tensor, "batch length"] | None = None,
        attention_mask: Int[Tensor, "batch seen"] | None = None,
        inputs_embeds: Float[Tensor, "batch length dim"] | None = None,
        cache: GLACache | None = None,
        labels: Int[Tensor, "batch length"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seqlens: Int[Tensor, " sequences_plus_one"] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Score every next token.

        Args:
            input_ids: token ids ``(batch, length)``.
            attention_mask: 1 at real tokens and 0 at padding, ``(batch, length)``, or as long as all tokens that the
                cache has seen and these.
            inputs_embeds: embedded tokens ``(batch, length, hidden_size)`` in place of ``input_ids``.
            cache: states to go on from, updated in place (``past_key_values`` is understood as well).
            labels: ids to predict, ``(batch, length)``, -100 where nothing is asked; they are shifted here, so they are
                ``input_ids`` with -100 at padding, and at the first token of every packed sequence.
            use_cache: return a cache even if none was given. Default: the configuration's in evaluation mode, off in
                training.
            output_hidden_states: return what enters every block, and the normed features.
            return_dict: return a ``CausalLMOutputWithPast`` in place of a tuple.
            logits_to_keep: score the last so many tokens only (0: all), or those at these positions.
            cu_seqlens: boundaries of sequences packed in one batch row.
            **kwargs: for the loss: ``num_items_in_batch``, ``shift_labels``, ``ignore_index``.

        Returns:
            ``loss`` (with labels), ``logits`` ``(batch, length, vocab_size)``, ``cache``, ``hidden_states``; zeros are
            scored at padding.

        Raises:
            TypeError: wrong dtype, a cache of another library, or an unknown keyword.
            ValueError: wrong shape or mask, or not exactly one of ``input_ids`` and ``inputs_embeds``.
        """
        if "past_key_values" in kwargs:
            given = kwargs.pop("past_key_values")
            cache = given if cache is None else cache
        loss_options = {name: kwargs.pop(name) for name in _LOSS_OPTIONS if name in kwargs}
        if kwargs.pop("output_attentions", None):
            raise ValueError("output_attentions must be False: there is no attention matrix")
        if kwargs:
            raise TypeError(
                f"forward got unknown keywords: {', '.join(sorted(kwargs))}; packed sequences need cu_seqlens"
            )
        if cache is not None and not isinstance(cache, GLACache):
            raise TypeError(f"cache must be a GLACache, got {type(cache).__name__}")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if input_ids is not None:
            check_shape("input_ids", input_ids, (None, None), "batch, length")
            check_integer("input_ids", input_ids)
            inputs_embeds = self.model.embeddings(input_ids)
        assert inputs_embeds is not None
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if cache is None and use_cache:
            cache = GLACache()
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        features, hidden_states = self.model.encode(
            inputs_embeds, attention_mask, cache, cu_seqlens, return_hidden_states=bool(wanted)
        )
        logits = self.lm_head(_keep(features, logits_to_keep))
        loss = None
        if labels is not None:
            check_shape("labels", labels, logits.shape[:2], "batch, length")
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **loss_options)
        states: Any = cache
        output = CausalLMOutputWithPast(loss=loss, logits=logits, cache=states, hidden_states=hidden_states or None)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _init_weights(self, module: nn.Module) -> None:
        """Called by transformers for every module that owns parameters."""
        initialize(module, self.config.initializer_range)

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        """Called by transformers to turn gradient checkpointing on or off."""
        for block in self.model.layers:
            block._gradient_checkpointing_func = gradient_checkpointing_func
        self.model.set_gradient_checkpointing(enable, every_n_layers)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Whether ``generate`` may hand in that library's own cache, which grows with every token."""
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Give ``generate`` an empty cache to begin with, unless it was told to go on from one, or to do without."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        if model_kwargs.get("cache") is None and generation_config.use_cache is not False:
            model_kwargs["cache"] = GLACache()


def gla_language_model(**config: Any) -> GLAForCausalLM:
    """Build a language model from the keywords of :class:`GLAConfig`.

    Args:
        **config: sizes and options.

    Returns:
        The freshly initialised model.

    Raises:
        MissingExtraError: transformers is not installed.
        ValueError: an option is not on offer.
    """
    return GLAForCausalLM(GLAConfig(**config))


_LOSS_OPTIONS = ("num_items_in_batch", "shift_labels", "ignore_index")


def _keep(features: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The tokens that are to be scored."""
    if isinstance(logits_to_keep, Tensor):
        return features[:, logits_to_keep]
    return features[:, -logits_to_keep:] if logits_to_keep else features
