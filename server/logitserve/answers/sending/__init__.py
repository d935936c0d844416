"""Answers on their way out: run, sent as they come or whole, filled where they are silent, ended when they take too long."""
