"""Logs, cursors, encoders, model sources, delivery. Knows nothing of routes.

Floors, lowest first; a module imports only from lower floors (tests/test_floors.py holds it so):

    0  config errors
    1  clock events markup models publisher
    2  decoder demo dialects log
    3  encoders frames history_file rooms upstream writer
    4  delivery generation history redis_link
    5  channels presence producer redis_listing responses sockets
    6  generations redis_scripts
    7  redis_rooms
    8  redis_replicas
    9  redis_mirror
    10 redis_bridge
"""
