import sys, logging
from pathlib import Path
def main():
    from edge_sdk.settings import load_settings
    from edge_sdk.daemon import Daemon
    from edge_sdk.mqtt.transports.paho import PahoTransport
    logging.basicConfig(level="INFO",stream=sys.stderr)
    s=load_settings(None,{"engines":sys.argv[1],"device":"dev","broker":{"url":sys.argv[2]}})
    sys.exit(Daemon(s,PahoTransport()).run())
main()
