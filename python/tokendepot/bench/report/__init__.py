"""`tokendepot report`: one page on what a depot changed, made of results of `tokendepot bench ttft`."""
