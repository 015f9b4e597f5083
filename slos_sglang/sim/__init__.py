"""An iteration-level simulation of one server that drives the very policy objects of the real one."""
