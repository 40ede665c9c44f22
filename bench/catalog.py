"""Every case by its name, in the order of the report."""

from bench.bridge import BRIDGE
from bench.cases import STREAMS
from bench.fanout import FANOUT
from bench.stalled import CROWDED

CASES = STREAMS | FANOUT | CROWDED | BRIDGE
