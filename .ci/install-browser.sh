#!/bin/bash
# Install the browser in which the pages are tested; does nothing where there is one.
set -euo pipefail
command -v chromium google-chrome >/dev/null && exit 0
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends chromium fonts-liberation
