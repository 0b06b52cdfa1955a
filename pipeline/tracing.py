"""Networks as graphs of modules, by torch.fx."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import fx, nn

from pipeline.errors import InputError
from pipeline.involution import Involve
from pipeline.layers import ChannelPad, ChannelSelect, FilteringLayer
from pipeline.redirect import Redirect


class Tracer(fx.Tracer):
    """Looks into no layer that surgery knows."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = (FilteringLayer, nn.modules.batchnorm._BatchNorm, ChannelPad, ChannelSelect, Involve, Redirect)
        return isinstance(m, own) or super().is_leaf_module(m, module_qualified_name)


def norms_after(model: nn.Module) -> dict[str, str]:
    """The batch norm that alone reads a convolution, by their qualified names; layers called more than once are left out.
    `InputError` where torch.fx cannot trace the network."""
    with tracing(model):
        return norms_in(Tracer().trace(model), dict(model.named_modules()))


def norms_in(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    calls = [node for node in graph.nodes if node.op == "call_module"]
    often = {name for name, count in Counter(str(node.target) for node in calls).items() if count > 1}
    found = {}
    for node in calls:
        (source, *_) = [*node.all_input_nodes, None]
        if source is None or source.op != "call_module" or len(source.users) > 1 or often & {str(node.target), str(source.target)}:
            continue
        norm, layer = modules[str(node.target)], modules[str(source.target)]
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and isinstance(layer, nn.Conv2d):
            found[str(source.target)] = str(node.target)
    return found


@contextmanager
def tracing(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; what goes wrong as an `InputError`."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    except Exception as error:  # whatever a foreign forward raises
        cause = error.__cause__ or error
        raise InputError(
            f"the channels of {type(model).__name__} cannot be followed: torch.fx says {type(cause).__name__}: {cause}; "
            "a forward pass may not branch on the values of tensors"
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training
