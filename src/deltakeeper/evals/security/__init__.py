"""Security: events that an attack aims at."""
