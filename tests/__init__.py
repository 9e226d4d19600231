"""A package, so that what the tests share is `tests.support` whatever else is installed."""
