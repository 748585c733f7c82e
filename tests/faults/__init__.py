"""The fault harness: a real daemon and a real broker, with everything between them and around them going wrong.

    proxy         a TCP proxy that delays, drops, resets, half-opens, cuts and slows
    fake_broker   a broker that follows rules, packet by packet, for what no real broker does on demand
    systemd       what systemd hears of a daemon
    vitals        what a process holds, from /proc
    fleet         clients that ask what they know the answer to
    history       what they asked and were answered, and what was done meanwhile, as a file
    checker       the invariants, decided from the history alone
    scene         all of these together
    kill, soak    commands: kill -9 by the thousand; hours of random faults

docs/reliability.md has the table of faults, each with its test.
"""
