"""Annotated SGLang programs to run and to copy.

A program is a module with `main`, an `sgl.function`; the arguments of `main` are what `slos-sglang run NAME --set
KEY=VALUE` sets, and their defaults make it run as it is.
"""
