"""Ids of channels: which are equal, which must stay, and where each of them is made, read and passed on."""

from collections.abc import Callable
from dataclasses import dataclass, field

Ids = list[int]


@dataclass
class Channels:
    """Ids of the channels of every layer, by the layer's qualified name; equal channels have equal ids."""

    inputs: dict[str, Ids] = field(default_factory=dict)  # of filtering layers: what they read
    outputs: dict[str, Ids] = field(default_factory=dict)  # of filtering layers: what they make
    channelwise: dict[str, Ids] = field(default_factory=dict)  # of batch norms and depthwise convolutions
    involved: dict[str, Ids] = field(default_factory=dict)  # of involutions, which have no tensors
    pads: dict[str, tuple[Ids, Ids]] = field(default_factory=dict)  # zero channels before and after
    selects: dict[str, tuple[Ids, Ids]] = field(default_factory=dict)  # of ChannelSelect: read, passed on
    redirects: dict[str, tuple[Ids, Ids, Ids]] = field(default_factory=dict)  # of Redirect: read, its slots, the source of each
    groups: dict[str, list[tuple[Ids, Ids]]] = field(default_factory=dict)  # of grouped layers: what each group reads and makes
    shape: tuple[int, int, int] = (0, 0, 0)  # (C, H, W) of the images
    pixels: dict[str, int] = field(default_factory=dict)  # where a filtering or depthwise layer applies its kernel, for one image
    pinned: dict[int, str] = field(default_factory=dict)  # channels that must stay, and why
    summed: set[int] = field(default_factory=set)  # channels that take part in an addition
    norm_after: dict[str, str] = field(default_factory=dict)  # the batch norm that alone reads a convolution
    relu_source: dict[str, str] = field(default_factory=dict)  # the batch norm whose ReLU (averaged or not) a layer reads
    untreated: list[str] = field(default_factory=list)  # operators that were not understood
    uncalled: list[str] = field(default_factory=list)  # layers that the network has and does not call in evaluation
    parents: Ids = field(default_factory=list)

    def fresh(self, count: int) -> Ids:
        """New ids."""
        self.parents.extend(range(len(self.parents), len(self.parents) + count))
        return list(range(len(self.parents) - count, len(self.parents)))

    def find(self, channel: int) -> int:
        """The one id that stands for all channels equal to this one."""
        while self.parents[channel] != channel:
            self.parents[channel] = channel = self.parents[self.parents[channel]]
        return channel

    def unite(self, first: Ids, second: Ids) -> None:
        """Make channels equal, pair by pair; the older id stands for both."""
        for a, b in zip(map(self.find, first), map(self.find, second), strict=True):
            self.parents[max(a, b)] = min(a, b)

    def pin(self, channels: Ids, why: str) -> None:
        """Keep these channels, whatever is asked."""
        for channel in channels:
            self.pinned.setdefault(channel, why)

    def pins(self) -> dict[int, str]:
        """Why a channel must stay, by the id that stands for it."""
        return {self.find(channel): why for channel, why in reversed(self.pinned.items())}

    @property
    def own(self) -> dict[str, Ids]:
        """What layers treat channel by channel, those without tensors among them."""
        return {**self.channelwise, **self.involved}

    def settle(self) -> None:
        """Write the id that stands for it in place of every id."""
        rooted: Callable[[Ids], Ids] = lambda ids: [self.find(channel) for channel in ids]  # noqa: E731
        for lists in (self.inputs, self.outputs, self.channelwise, self.involved):
            lists.update({name: rooted(ids) for name, ids in lists.items()})
        for pairs in (self.pads, self.selects):
            pairs.update({name: (rooted(first), rooted(second)) for name, (first, second) in pairs.items()})
        self.redirects = {name: (rooted(read), rooted(slots), rooted(of)) for name, (read, slots, of) in self.redirects.items()}
        self.groups = {name: [(rooted(a), rooted(b)) for a, b in parts] for name, parts in self.groups.items()}
        self.pinned, self.summed = self.pins(), {self.find(channel) for channel in self.summed}

    def joins(self, name: str) -> bool:
        """Whether what the layer makes is added to something else, as at the end of a residual block."""
        made = self.outputs.get(name) or self.channelwise.get(name, [])
        return bool({*made} & self.summed)

    def units(self) -> dict[int, int]:
        """A label for every channel: those that go together or not at all, so that the groups of grouped layers stay equal, share
        one. The n-th channels of all groups of a layer go together, in what it reads and in what it makes."""
        united = Channels(parents=list(self.parents))
        for parts in self.groups.values():
            for side in zip(*parts, strict=True):
                for ids in side[1:]:
                    united.unite(side[0], ids)
        return {self.find(channel): united.find(channel) for channel in range(len(self.parents))}
