"""What happened, measured: clocks, throughput, CPU time, page cache and machine. Interpretation is in `diagnosis`."""
