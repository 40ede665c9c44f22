"""One room in other ways: GET /ws and /events follow it, POST /publish sends its body to all."""
