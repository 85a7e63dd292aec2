"""GPT-2 of Hugging Face's transformers as a network of an autoregressive model, from its sizes or from trained weights.

It gives logits only: the loss, with its shift by one token, is the model's own, the same for every network. Weights come
from a folder on this machine, in float32 whatever they were saved in; nothing is downloaded.

References:
    Radford et al. 2019, "Language models are unsupervised multitask learners" (GPT-2).
    Wolf et al. 2020, "Transformers: state-of-the-art natural language processing", arXiv:1910.03771.
    Hu et al. 2021, "LoRA: low-rank adaptation of large language models", arXiv:2106.09685.
"""

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn

from src.core.errors import UserError, require_at_least, require_sizes
from src.core.pretrained import MARKS, gpt2_config, weights_sha256
from src.networks.causal import CausalNetwork
from src.networks.transformer import Transformer

__all__ = ["GPT2", "as_gpt2", "gpt2_of_transformer"]

log = logging.getLogger(__name__)

_BASE = ".base_layer"  # what peft puts into the names of weights that it adapts
_OF_TOKENS = ("wte.weight", "lm_head.weight")  # a row for each token
_PADDED_TO = 64  # vocabularies are padded to multiples of it, or of twice as many, as 50,257 to 50,304


class GPT2(CausalNetwork):
    """Logits of the next token by `transformers.GPT2LMHeadModel`.

    Args:
        num_tokens: V.
        length: the longest input of the data.
        num_layers, num_heads, width, dropout: as of `Transformer`; sizes have no meaning beside `weights`.
        weights: a folder that `save_pretrained` has written; None for random weights.
            They may be of a vocabulary that was padded to a multiple of 64: the rows of no token are left out.
        config: what that folder's config.json says; None reads it there. With it the network can be built where the folder
            is not, as when a run is evaluated elsewhere; `load_weights` needs the folder.
        sha256: of the weights in that folder (`weights_sha256`); None takes any.
        lora_rank: train nothing but low-rank additions of this rank to some weights; None for all weights.
        lora_alpha: the additions are scaled by lora_alpha / lora_rank.
        lora_targets: names of the layers that are added to, as "c_attn".
        condition_dim: must be 0: GPT-2 has no place for a class.
    """

    max_length: int

    def __init__(
        self,
        num_tokens: int,
        length: int,
        num_layers: int,
        num_heads: int,
        width: int,
        dropout: float,
        weights: str | None = None,
        config: dict[str, Any] | None = None,
        sha256: str | None = None,
        lora_rank: int | None = None,
        lora_alpha: float = 16.0,
        lora_targets: tuple[str, ...] | list[str] = ("c_attn",),
        condition_dim: int = 0,
    ) -> None:
        super().__init__()
        if condition_dim:
            raise UserError(
                "has a network without a place for a class: choose network=transformer, or model.conditional=false"
            )
        if not 0 <= dropout < 1:
            raise UserError(f"has a network with dropout={dropout}, which must be at least 0 and below 1")
        if weights is None:
            require_sizes(num_layers=num_layers, num_heads=num_heads, width=width)
            if width % num_heads:
                raise UserError(f"has a network with width={width}, which must be a multiple of num_heads={num_heads}")
            config = {"n_positions": length, "n_embd": width, "n_layer": num_layers, "n_head": num_heads}
            config |= {"vocab_size": num_tokens}
        elif config is None:
            config = gpt2_config(weights)
        self._weights = weights
        self._sha256 = sha256
        self._require_fit(config, num_tokens, length)
        self.max_length = int(config.get("n_positions", 1024))
        self.num_tokens = num_tokens
        self.net = _new({**config, "vocab_size": num_tokens}, dropout)
        if lora_rank is not None:
            self._add_lora(lora_rank, lora_alpha, list(lora_targets))

    def forward(self, tokens: Tensor, condition: Tensor | None = None) -> Tensor:
        """Tokens `(B, T)` int64 to logits `(B, T, V)`."""
        assert tokens.shape[1] <= self.max_length, "the input is longer than the positions"
        return self.net(input_ids=tokens, use_cache=False).logits

    def begin(self, batch_size: int) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.net.config)

    def state_size(self, length: int) -> int:
        return 2 * self.net.config.n_layer * self.net.config.n_embd * length

    def step(self, token: Tensor, state: Any, condition: Tensor | None = None) -> tuple[Tensor, Any]:
        """As of the base; the state is changed in place, and given back."""
        return self.read(token[:, None], state, condition)

    def read(self, tokens: Tensor, state: Any, condition: Tensor | None = None) -> tuple[Tensor, Any]:
        read_so_far = state.get_seq_length() + tokens.shape[1]
        assert read_so_far <= self.max_length, "the input is longer than the positions"
        out = self.net(input_ids=tokens, past_key_values=state, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], out.past_key_values

    def load_weights(self) -> None:
        """Take the weights of the folder, in the dtype of this network; nothing without a folder."""
        if self._weights is None:
            return
        gpt2_config(self._weights)
        found = weights_sha256(self._weights)
        if self._sha256 is not None and found != self._sha256:
            raise UserError(
                f"network.weights={self._weights} holds other weights than when this run was made (their SHA-256 was "
                f"{self._sha256[:12]}, now it is {str(found)[:12]}); restore them, or begin a new run"
            )
        own = self.net.state_dict()
        try:
            loaded, report = _transformers().GPT2LMHeadModel.from_pretrained(
                self._weights, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
            given = {name if name in own else _adapted(name): weight for name, weight in loaded.state_dict().items()}
            self.net.load_state_dict({**own, **self._without_padding(given)})
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"the weights in network.weights={self._weights} cannot be read: {error}") from error
        if lacking := sorted(report["missing_keys"]):  # transformers would begin with random numbers in their place
            some = f"{lacking[0]} (and {len(lacking) - 1} others)" if len(lacking) > 1 else lacking[0]
            raise UserError(f"the weights in network.weights={self._weights} are not all there: {some} is missing")

    def merged(self) -> nn.Module:
        """A `transformers.GPT2LMHeadModel` that does the same, with all additions added in, in evaluation mode; a copy."""
        net = copy.deepcopy(self.net)
        for module in net.modules():
            if hasattr(module, "base_layer"):
                module.merge()
        plain = _new(net.config.to_dict(), 0.0)
        state = {name.replace(_BASE, ""): weight for name, weight in net.state_dict().items() if "lora_" not in name}
        plain.load_state_dict(state)
        return plain.eval()

    def _without_padding(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights without rows that stand for no token."""
        size = self.net.config.vocab_size
        names = [name for name in given if name.endswith(_OF_TOKENS) and len(given[name]) > size]
        if names:
            num_rows = len(given[names[0]])
            log.info(
                f"network.weights={self._weights} has rows for {num_rows:,} tokens; the last {num_rows - size} stand for "
                "none of the tokenizer's and are left out"
            )
        return {**given, **{name: given[name][:size] for name in names}}

    def _require_fit(self, config: dict[str, Any], num_tokens: int, length: int) -> None:
        vocabulary, positions = config.get("vocab_size", 50257), config.get("n_positions", 1024)
        is_padded = vocabulary % _PADDED_TO == 0 and 0 < vocabulary - num_tokens < 2 * _PADDED_TO
        if vocabulary != num_tokens and not is_padded:
            raise UserError(
                f"has weights of {vocabulary:,} tokens (network.weights={self._weights}), the data has {num_tokens:,}; cut "
                f"the text by the tokenizer of these weights: tokenizer=pretrained tokenizer.path={self._weights}"
            )
        if positions < length:
            raise UserError(
                f"has weights that see {positions:,} tokens at most (network.weights={self._weights}); set "
                f"data.context={positions} or less, it is {length}"
            )

    def _add_lora(self, rank: int, alpha: float, targets: list[str]) -> None:
        if self._weights is None:
            raise UserError(
                "network.lora_rank adds to trained weights; give them by network.weights=FOLDER, or set it to null"
            )
        require_at_least("network.lora_rank", rank, 1)
        require_at_least("network.lora_alpha", alpha, 0)
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise UserError("network.lora_rank needs the package peft; install it: make extra EXTRA=text") from error
        settings: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "target_modules": targets}
        try:
            inject_adapter_in_model(LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True, **settings), self.net)
        except ValueError as error:
            raise UserError(
                f"network.lora_targets={targets} names no layer of GPT-2, as c_attn or c_proj: {error}"
            ) from error
        for name, weight in self.net.named_parameters():
            weight.requires_grad_("lora_" in name)


def as_gpt2(network: nn.Module) -> nn.Module:
    """The `transformers.GPT2LMHeadModel` that does what a network does, in evaluation mode.

    Raises `UserError` for one that has another form.
    """
    if isinstance(network, GPT2):
        return network.merged()
    if isinstance(network, Transformer):
        return gpt2_of_transformer(network)
    raise UserError(
        f"its network {type(network).__name__} does not have the form of GPT-2; network=transformer and gpt2 do"
    )


def gpt2_of_transformer(network: Transformer) -> nn.Module:
    """Our Transformer as `transformers.GPT2LMHeadModel`, in evaluation mode.

    GPT-2 keeps the weights of linear layers transposed, and has biases: zeros where ours has none.
    """
    if network.condition is not None:
        raise UserError("its network is given a class, for which GPT-2 has no place")
    state = {
        "transformer.wte.weight": network.tokens.weight,
        "transformer.wpe.weight": network.positions.weight,
        "transformer.ln_f.weight": network.norm.weight,
        "transformer.ln_f.bias": _bias(network.norm),
        "lm_head.weight": network.head.weight,
    }
    names = {"norm_1": "ln_1", "qkv": "attn.c_attn", "out": "attn.c_proj"}
    names |= {"norm_2": "ln_2", "up": "mlp.c_fc", "down": "mlp.c_proj"}
    for i, block in enumerate(network.blocks):
        for own, theirs in names.items():
            layer, prefix = getattr(block, own), f"transformer.h.{i}.{theirs}"
            state[f"{prefix}.weight"] = layer.weight.T if isinstance(layer, nn.Linear) else layer.weight
            state[f"{prefix}.bias"] = _bias(layer)
    num_tokens, width = network.tokens.weight.shape
    config = {
        "vocab_size": num_tokens,
        "n_positions": len(network.positions.weight),
        "n_embd": width,
        "n_layer": len(network.blocks),
        "n_head": network.num_heads,
        "activation_function": "gelu",
        "tie_word_embeddings": network.head.weight is network.tokens.weight,
    }
    net = _new(config, 0.0)
    net.load_state_dict({name: weight.detach() for name, weight in state.items()})
    return net.eval()


def _bias(layer: Any) -> Tensor:
    if layer.bias is not None:
        return layer.bias
    size = layer.out_features if isinstance(layer, nn.Linear) else layer.weight.shape[0]
    return layer.weight.new_zeros(size)


def _adapted(name: str) -> str:
    """The name of a weight where peft has put an addition beside it."""
    layer, _, kind = name.rpartition(".")
    return f"{layer}{_BASE}.{kind}"


def _new(config: dict[str, Any], dropout: float) -> Any:
    """An untrained network, in training mode, with marks of begin and end only where the config has them."""
    transformers = _transformers()
    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    marks = {}
    for name in MARKS:  # transformers would fill in its own, far outside of few tokens
        number = config.get(name)
        marks[name] = number if isinstance(number, int) and number < config["vocab_size"] else None
    try:
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**config, **rates, **marks})).float().train()
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"has a network that transformers refuses: {error}") from error


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError("network=gpt2 needs the package transformers; install it: make extra EXTRA=text") from error
    try:
        transformers.GPT2LMHeadModel  # noqa: B018 - only now transformers imports it, with all that it needs
    except Exception as error:  # what other packages raise, as an installed torchaudio that was built for another torch
        last = str(error).strip().splitlines()[-1:]
        raise UserError(
            "network=gpt2 cannot import GPT-2 from transformers, which imports any torchaudio that is installed; mend "
            f"that, or remove it with pip uninstall torchaudio ({type(error).__name__}: {''.join(last)})"
        ) from error
    transformers.utils.logging.disable_progress_bar()  # a bar for each file that is read or written
    return transformers
