"""`tokendepot doctor`: what a host and its directories can do, and what a depot would use there.

* `findings` - what is said; `host` - the only module that asks the machine, and the seam that tests replace.
* `machine` - the findings on the host; `roots` - those on a directory that is, or is to be, a root.
"""
