"""Takes for ever to import, for test_engine."""

import time

time.sleep(600)
