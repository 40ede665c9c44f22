"""Every case by its name, in the order of the report."""

from bench.bridge import BRIDGE
from bench.cases import STREAMS
from bench.costs import DOORS
from bench.fanout import FANOUT
from bench.stalled import CROWDED

CASES = STREAMS | FANOUT | CROWDED | BRIDGE | DOORS
