"""`tokendepot bench io`: a depot on given roots and devices, cell by cell, next to what medium and link give without it."""
