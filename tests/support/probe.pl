# What can be seen and reached from in here; one finding per line. Arguments:
#   MARK1 MARK2   the halves of a word that was planted all over the host
#   ADDRESS:PORT... and names to resolve
use strict;
use Socket;

my $mark = shift() . shift();
$| = 1;

sub say_it { print join(" ", "seen:", @_), "\n" }

sub slurp {
    open(my $file, "<", $_[0]) or return "";
    local $/;
    my $data = <$file>;
    return defined $data ? $data : "";
}

for (split /\n/, slurp("/proc/net/dev")) { say_it("interface", $1) if /^\s*(\S+):/ }

for my $target (@ARGV) {
    my ($host, $port) = split /:/, $target;
    if (!defined $port) {
        say_it("resolved", $host) if gethostbyname($host);
        next;
    }
    socket(my $tcp, AF_INET, SOCK_STREAM, 0) or die "socket: $!";
    local $SIG{ALRM} = sub { die "slow\n" };
    my $connected = eval { alarm 3; connect($tcp, sockaddr_in($port, inet_aton($host))) };
    alarm 0;
    say_it("connected", $target) if $connected;
    socket(my $udp, AF_INET, SOCK_DGRAM, 0) or die "socket: $!";
    say_it("sent", $target)
        if $host !~ /^127\./ && send($udp, "x", 0, sockaddr_in($port, inet_aton($host)));
}

for my $kind (SOCK_STREAM, SOCK_DGRAM) {
    socket(my $unix, AF_UNIX, $kind, 0) or die "socket: $!";
    say_it("abstract", $mark) if connect($unix, pack_sockaddr_un("\0$mark"));
}
say_it("raw") if socket(my $packet, 17, SOCK_RAW, 0x0300);

my $marked = qr/\Q$mark\E/;
for my $name (sort keys %ENV) { say_it("marked", "environment", $name) if $ENV{$name} =~ $marked }
for my $process (glob("/proc/[0-9]*")) {
    my $argv = join " ", split /\0/, slurp("$process/cmdline");
    say_it("process", $argv) if $argv ne "";
    for (qw(environ mountinfo)) { say_it("marked", "$process/$_") if slurp("$process/$_") =~ $marked }
}
my @pruned = qw(( -path /proc -o -path /sys ) -prune -o);
for my $what (["socket", qw(-type s -print)], ["planted", "-name", "*$mark*", "-print"]) {
    my ($label, @test) = @$what;
    open(my $found, "-|", "find", "/", @pruned, @test) or die "find: $!";
    while (<$found>) { chomp; say_it($label, $_) }
}
open(my $found, "-|", "grep -rlaF --exclude-dir=proc --exclude-dir=sys -e $mark / 2>/dev/null") or die;
while (<$found>) { chomp; say_it("marked", $_) }
say_it("end");
