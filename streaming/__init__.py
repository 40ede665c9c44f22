"""Logs, cursors, encoders, model sources, delivery. Knows nothing of routes.

Floors, lowest first; a module imports only from lower floors (tests/test_floors.py holds it so):

    0  errors grants metrics schema
    1  clock config events markup models publisher redis_node
    2  auth decoder demo dialects limits log
    3  encoders frames history_file places room tickets upstream writer
    4  delivery generation history redis_link rooms
    5  channels presence producer redis_cluster redis_listing responses sockets
    6  generations redis_scripts
    7  redis_doors redis_rooms
    8  redis_replicas
    9  redis_mirror
    10 redis_bridge
"""
