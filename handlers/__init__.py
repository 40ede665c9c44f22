"""The HTTP and WebSocket edges, one file a surface: parse, authorise, call, encode."""
