"""The table that ``train_kd.py --list-taps`` prints: the maps of both networks, and what else could be one."""
from __future__ import annotations

from torch import nn

from dataset import get_dataset_spec
from engine.class_map import class_map_of
from engine.settings import Settings
from models import NetworkChoice
from models.output import SegOutput
from models.outside import OutsideNet, candidates


def tap_table(settings: Settings) -> str:
    """Taps of student and teacher with channels and strides; of a network of another library also every submodule that
    returns a map. Raises UserError for unknown networks or data sets."""
    spec, networks = get_dataset_spec(settings.data.dataset, settings.data.data), settings.networks
    class_map = class_map_of(networks, spec)
    taught = class_map.taught if class_map else spec.num_class
    return "\n\n".join((described("student", networks.student, spec.num_class),
                        described("teacher", networks.teacher, taught)))


def described(role: str, choice: NetworkChoice, num_class: int) -> str:
    """The part of one network."""
    net = choice.build_bare(num_class)
    lines = [f"{role}: {net.name}, {num_class} classes",
             *(f"    {tap:<7} {net.channels[tap]:>5} channels, stride {net.strides[tap]:<3}{tapped(net, tap)}".rstrip()
               for tap in SegOutput._fields if tap in net.channels)]
    if isinstance(net, OutsideNet):
        lines += [f"  --{role}-taps TAP=PATH takes any of these, for an image of {net.side}x{net.side} "
                  "(PATH:in: the input of the module):"]
        lines += [f"    {path:<60} {' x '.join(map(str, shape[1:]))}" for path, shape in candidates(net.net, net.side)]
    return "\n".join(lines)


def tapped(net: nn.Module, tap: str) -> str:
    """Where a tap of a network of another library is."""
    if not isinstance(net, OutsideNet):
        return ""
    return f" {net.taps.get(tap, 'what the network returns')}"
