"""Which modules a backward reaches: those whose output depends on something that is trained.

What isn't reached keeps nothing for the backward, is not gathered for it and exchanges nothing in it. The way of the
tensors is that of models/dit.py; a module stands for its output.
"""

from collections.abc import Iterable

from framework.models.config import ModelConfig, is_adapter
from framework.plan.parameters import ParameterShape

EMBEDDER = "condition_embedder"


class Reach:
    """The names of reached modules, and of `X.enter` for what goes into the linears of X, `X.attention` for attention
    itself. A block is reached when its output is.
    """

    def __init__(self, config: ModelConfig, parameters: Iterable[ParameterShape]) -> None:
        self._trained = {module_of(parameter.name) for parameter in parameters if parameter.trained}
        self._reached: set[str] = set()
        x, time, table, text, image = self._embed(config)
        for index in range(config.num_layers):
            x = self._block(config, f"blocks.{index}", x, table, text, image)
        self._pass("proj_out", x, time, "" in self._trained)
        self._pass("", True)

    def __contains__(self, module: str) -> bool:
        return module in self._reached

    def _pass(self, module: str, *inputs: bool) -> bool:
        """Note a module; whether its output depends on something that is trained."""
        if any(inputs) or module in self._trained:
            self._reached.add(module)
        return module in self._reached

    def _chain(self, modules: Iterable[str], start: bool) -> bool:
        """Modules one after the other."""
        for module in modules:
            start = self._pass(module, start)
        return start

    def _embed(self, config: ModelConfig) -> tuple[bool, bool, bool, bool, bool]:
        """Tokens, `temb`, modulation, text, image."""
        x = self._pass("patch_embedding")
        time = self._chain((f"{EMBEDDER}.time_embedder.linear_{i}" for i in (1, 2)), False)
        table = self._pass(f"{EMBEDDER}.time_proj", time)
        text = self._chain((f"{EMBEDDER}.text_embedder.linear_{i}" for i in (1, 2)), False)
        parts = ("norm1", "ff.net.0.proj", "ff.net.2", "norm2") if config.image_dim is not None else ()
        embedder = f"{EMBEDDER}.image_embedder"
        image = self._chain((f"{embedder}.{part}" for part in parts), embedder in self._trained)
        return x, time, table, text, image

    def _block(self, config: ModelConfig, name: str, x: bool, table: bool, text: bool, image: bool) -> bool:
        """A block's output."""
        table = table or name in self._trained
        own, cross, ffn = f"{name}.attn1", f"{name}.attn2", f"{name}.ffn"
        tokens = self._pass(f"{own}.enter", x, table)
        x = self._attend(own, tokens, [("to_k", "norm_k", tokens), ("to_v", "", tokens)]) or x or table

        tokens = self._pass(f"{cross}.enter", self._pass(f"{name}.norm2", x))
        sides = [("to_k", "norm_k", text), ("to_v", "", text)]
        if config.added_kv_proj_dim is not None:
            sides += [("add_k_proj", "norm_added_k", image), ("add_v_proj", "", image)]
        x = self._attend(cross, tokens, sides) or x

        hidden = self._pass(f"{ffn}.net.0.proj", self._pass(f"{ffn}.enter", x, table))
        x = self._pass(f"{ffn}.net.2", hidden) or x or table
        return self._pass(name, x)

    def _attend(self, name: str, tokens: bool, sides: list[tuple[str, str, bool]]) -> bool:
        """Attention of queries from `tokens` to keys and values: (linear, norm or nothing, input)."""
        seen = [self._chain((f"{name}.to_q", f"{name}.norm_q"), tokens)]
        for linear, norm, start in sides:
            modules = [f"{name}.{linear}", *([f"{name}.{norm}"] if norm else [])]
            seen.append(self._chain(modules, start))
        return self._pass(f"{name}.to_out.0", self._pass(f"{name}.attention", *seen))


def module_of(parameter: str) -> str:
    """The module that a parameter belongs to; an adapter's is its linear."""
    module = parameter.rpartition(".")[0]
    return module.rpartition(".")[0] if is_adapter(parameter) else module
