"""The compile room: an ONNX file becomes an engine package. `pipeline` is the journey; each other file is one stop.

inspect      read the file, trusting nothing in it; say what it is
modernize    old and odd exports -> one modern FP32 graph
datasets     calibration and validation samples, streamed
calibrate    one walk over the samples -> statistics of every tensor that will be held in 8 bits
quantize     graph + ranges -> Q/DQ graph, in the device's own scheme
widths       FP16 and FP32 graphs from one another
mixed        INT8 graph -> the same with an FP16 rest
candidates   the graphs that may be packed, the one that the device would like best first
verify       is it right, is it faster
golden       a few requests, to compare engines on
compiled     graph -> engine, for devices that load one
evaluate     the same of a finished package, on other data
report       the figures, for a program and for a person
"""
