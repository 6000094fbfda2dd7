# What answers on the network of a sandbox, seen by a builder that is root of its kernel.
# Arguments: ADDRESS:PORT ..., where RELAY and GATEWAY stand for the two first addresses of its
# network. One finding per line, as probe.pl.
use strict;
use Socket qw(:all);
use POSIX qw(:errno_h);

my @targets = @ARGV;
$| = 1;

sub say_it { print join(" ", "seen:", @_), "\n" }

sub slurp {
    open(my $file, "<", $_[0]) or return "";
    local $/;
    my $data = <$file>;
    return defined $data ? $data : "";
}

# rtnetlink(7): one request, and the errno of its acknowledgement.
my $sequence = 0;
sub netlink {
    my ($type, $flags, $body) = @_;
    socket(my $kernel, 16, SOCK_RAW, 0) or return "$!";
    send($kernel, pack("LSSLL", 16 + length $body, $type, $flags | 5, ++$sequence, 0) . $body, 0,
        pack("SSLL", 16, 0, 0, 0)) or return "$!";
    recv($kernel, my $answer, 4096, 0);
    my $errno = -unpack("x16 l", $answer);
    return $errno ? do { local $! = $errno; "$!" } : "done";
}
sub attribute { my ($type, $data) = @_; pack("SSa*x![4]", 4 + length $data, $type, $data) }

my ($eth) = slurp("/proc/net/dev") =~ /^\s*(eth\d+):/m;
my $index = 2;
if ($eth) {
    my $file = slurp("/sys/class/net/$eth/ifindex");
    $index = $file + 0 if $file =~ /\d/;
}

# Addresses of the host's networks as its own, and a way there by its only interface.
sub own {
    my ($family, $bits, $address) = @_;
    return netlink(20, 0x600, pack("CCCCL", $family, $bits, 0, 0, $index)
        . attribute(1, $address) . attribute(2, $address));
}
say_it("interface", $eth);
for (["172.17.77.77", 16]) {
    say_it("took", $_->[0]) if own(AF_INET, $_->[1], inet_aton($_->[0])) eq "done";
}
say_it("took", "fe80::77") if own(AF_INET6, 64, inet_pton(AF_INET6, "fe80::77")) eq "done";
for (["packet", 17, 0x0300], ["icmp", AF_INET, 1], ["udp", AF_INET, 17]) {
    say_it("raw", $_->[0]) if socket(my $raw, $_->[1], SOCK_RAW, $_->[2]);
}
my ($network) = slurp("/etc/hosts") =~ /^(\d+\.\d+\.\d+)\.\d+\s+sandbox/m;

my %waiting;
sub try_it {
    my ($name, $family, $to) = @_;
    if (socket(my $udp, $family, SOCK_DGRAM, 0)) {
        send($udp, "$name", 0, $to) and $waiting{"udp $name"} = $udp;
    }
    socket(my $tcp, $family, SOCK_STREAM, 0) or return;
    $tcp->blocking(0);
    if (connect($tcp, $to)) { say_it("connected", $name) }
    elsif ($! == EINPROGRESS) { $waiting{"tcp $name"} = $tcp }
}
for my $target (@targets) {
    my ($host, $its) = $target =~ /(.*):(\d+)/;
    $host =~ s/^RELAY$/$network.2/;
    $host =~ s/^GATEWAY$/$network.1/;
    if ($host =~ /:/) {
        try_it($target, AF_INET6, pack_sockaddr_in6($its, inet_pton(AF_INET6, $host), $index));
    } else {
        try_it($target, AF_INET, pack_sockaddr_in($its, inet_aton($host)));
    }
}
my $end = time + 3;
while (time <= $end) {
    for my $name (keys %waiting) {
        my $socket = $waiting{$name};
        my $bits = "";
        vec($bits, fileno($socket), 1) = 1;
        my ($read, $write) = ($bits, $bits);
        next unless select($read, $write, undef, 0.01);
        if ($name =~ /^udp/) {
            next unless vec($read, fileno($socket), 1);
            my $from = recv($socket, my $data, 1000, 0);
            next unless defined $from;
            say_it("answered", $name, $data);
            if (length $from > 20) {
                my (undef, $address) = unpack_sockaddr_in6($from);
                my $found = inet_ntop(AF_INET6, $address);
                try_it("$found", AF_INET6, pack_sockaddr_in6(9999, $address, $index));
            }
        } elsif (vec($write, fileno($socket), 1)) {
            my $error = unpack("i", getsockopt($socket, SOL_SOCKET, SO_ERROR));
            say_it("connected", $name =~ s/^tcp //r) unless $error;
        }
        delete $waiting{$name};
    }
}
say_it("end");
