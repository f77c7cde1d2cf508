"""What torch and the machine offer: devices, collectives, hosts, errors that say where."""
