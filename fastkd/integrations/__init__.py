"""fastkd inside other people's train loops: a module for each framework, imported by name.

A top layer: it knows the trainer's pieces and a framework's interface, and nothing below knows it.
"""
