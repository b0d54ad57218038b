"""One verb, one file, one function with keyword arguments and a typed result. No command imports another."""
