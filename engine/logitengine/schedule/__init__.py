"""Who computes what next: pure logic, free of torch."""
