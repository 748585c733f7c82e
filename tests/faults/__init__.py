"""The fault harness: a real daemon and a real broker, with everything between them and around them going wrong.

    proxy         a TCP proxy that delays, drops, resets, half-opens, cuts and slows
    fake_broker   a broker that follows a script, packet by packet, for what no real broker does on demand
    history       what a fleet of clients asked and was answered, as a file
    fleet         clients that ask and write the history
    checker       the invariants, decided from the history alone

docs/reliability.md has the table of faults, each with its test.
"""
