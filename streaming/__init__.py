"""Logs, cursors, encoders, model sources, delivery. Knows nothing of routes.

Floors, lowest first; a module imports only from lower floors (tests/test_floors.py holds it so):

    0  errors config
    1  events markup
    2  log encoders dialects models demo upstream clock
    3  rooms generations delivery
"""
