from support.failures import print_at_once


def pytest_configure(config):
    print_at_once(config)
