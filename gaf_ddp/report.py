"""Tell what a log of AgreementLog says: who is out, since when, on which host, why; and draw it.

python -m gaf_ddp.report agreement.jsonl --out agreement.png
"""

from gaf_ddp.monitor.report_command import main

if __name__ == "__main__":
    main()
