"""One file for each way to train with the filter; each is all there is to it, and runs on CPUs too."""
