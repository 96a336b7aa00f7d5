#!/usr/bin/env bash
# Two hosts on this machine: network namespaces NAME-1 (10.77.0.1) and NAME-2 (10.77.0.2), joined by one cable.
# two_hosts.sh up|down|cut|heal NAME; two_hosts.sh on NAME 1|2 COMMAND...   Needs root and iproute2.
set -euo pipefail
what=$1 name=$2
case $what in
  up)
    for side in 1 2; do ip netns add "$name-$side"; done
    ip -n "$name-1" link add cable type veth peer name cable netns "$name-2"
    for side in 1 2; do
      ip -n "$name-$side" addr add "10.77.0.$side/24" dev cable
      ip -n "$name-$side" link set lo up
      ip -n "$name-$side" link set cable up
    done ;;
  on) GLOO_SOCKET_IFNAME=cable exec ip netns exec "$name-$3" "${@:4}" ;;
  cut) ip -n "$name-1" link set cable down ;;
  heal) ip -n "$name-1" link set cable up ;;
  down) for side in 1 2; do ip netns del "$name-$side" 2>/dev/null || true; done ;;
esac
