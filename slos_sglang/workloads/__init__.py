"""What is offered to a server: programs, scenarios, published traces, and the workload file format."""
