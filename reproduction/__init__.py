"""The claims of the Spikformer V2 paper at small scale: protocol, runs, and the report that is made from them."""
