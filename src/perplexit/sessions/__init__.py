"""One file an engine; the only place, with compilation and quantization, that imports one."""
