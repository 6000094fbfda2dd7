#include <stdio.h>

int main(void)
{
    puts("Hello from an image that was built inside gVisor.");
    return 0;
}
