"""Typed keys under which the application and a request hold what handlers need."""

from __future__ import annotations

from typing import Protocol

from aiohttp import web

from handlers.vigil import Vigil
from streaming.auth import Auth, Identity
from streaming.channels import Channels
from streaming.config import Config
from streaming.delivery import Delivery
from streaming.errors import RivuletError
from streaming.generation import Generation
from streaming.generations import Generations
from streaming.limits import Limits, Quota
from streaming.metrics import Metrics
from streaming.presence import Presence
from streaming.rooms import Rooms
from streaming.tickets import Tickets


class Need(Protocol):
    """What this instance is not whole without."""

    @property
    def ready(self) -> bool:
        """Whether it works now."""


class State:
    """What changes over the life of the application."""

    draining = False
    reading = 0  # bytes of bodies that have not come whole

    def __init__(self) -> None:
        self.needs: dict[str, Need] = {}  # by what /ready says where one does not work


AUTH = web.AppKey("auth", Auth)
CHANNELS = web.AppKey("channels", Channels)
CONFIG = web.AppKey("config", Config)
DELIVERY = web.AppKey("delivery", Delivery)
GENERATIONS = web.AppKey("generations", Generations)
LIMITS = web.AppKey("limits", Limits)
METRICS = web.AppKey("metrics", Metrics)
PRESENCE = web.AppKey("presence", Presence)
ROOMS = web.AppKey("rooms", Rooms)
STATE = web.AppKey("state", State)
TICKETS = web.AppKey("tickets", Tickets)
VIGIL = web.AppKey("vigil", Vigil)

GENERATION = web.RequestKey("generation", Generation)  # that it is answered with
IDENTITY = web.RequestKey("identity", Identity)
QUOTA = web.RequestKey("quota", Quota)  # what is left of the rate that it counted in
REFUSED = web.RequestKey("refused", RivuletError)  # to be told on the socket that it opens
REQUEST_ID = web.RequestKey("request_id", str)
USER = web.RequestKey("user", str)  # of the identity
