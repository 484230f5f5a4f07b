"""Agents for a load test, on gevent and Locust: they register, exchange offers, leave and come back."""
