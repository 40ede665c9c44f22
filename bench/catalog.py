"""Every case by its name, in the order of the report."""

from bench.bridge import BRIDGE
from bench.cases import STREAMS
from bench.fanout import FANOUT

CASES = STREAMS | FANOUT | BRIDGE
