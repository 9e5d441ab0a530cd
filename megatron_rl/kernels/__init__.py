"""Python faces of csrc/: one module a kernel, each with its plain reference. Loading and its checks: `build.py`.

Nothing here knows an engine, a trainer or the configuration.
"""
